//! Names of network interfaces.

use std::fmt;

/// A name that no interface can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotAnInterfaceName;

impl fmt::Display for NotAnInterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an interface's name has 1 to {MAX_LEN} bytes, without spaces, '/', ':' and '%'")
    }
}

impl std::error::Error for NotAnInterfaceName {}

/// Bytes: IFNAMSIZ without the zero at the end.
pub const MAX_LEN: usize = 15;

/// As the kernel has it (dev_valid_name), but for a '%', of which it would make a number.
pub fn check(name: &str) -> Result<(), NotAnInterfaceName> {
    let odd = |byte: u8| byte.is_ascii_whitespace() || matches!(byte, b'/' | b':' | b'%' | 0);
    let fits = (1..=MAX_LEN).contains(&name.len()) && !matches!(name, "." | "..");
    if fits && !name.bytes().any(odd) { Ok(()) } else { Err(NotAnInterfaceName) }
}
