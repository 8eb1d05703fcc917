//! What differs between processor architectures. There is one so far.

pub mod x86_64;
