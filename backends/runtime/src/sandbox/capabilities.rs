//! Privileges of this thread and of those it starts. The user stays who it is.

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Gives up all capabilities but one, and that of ever getting any. What is left is that of locking memory, if it was
/// there: I/O rings are not charged to their user when a thread sets them up that has it. Whoever has set up its rings
/// gives it up ([`cleave_common::sandbox::drop_memory_lock`]).
pub(super) fn drop_most() -> io::Result<()> {
    set_no_new_privs(true)?;
    match clear_ambient_capability_set() {
        // Before Linux 4.3 there is none.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(errno) => return Err(errno.into()),
    }
    // Without SETPCAP the bounding set stays; without new privileges nothing comes of it.
    if capabilities(None)?.effective.contains(CapabilitySet::SETPCAP) {
        empty_bounding_set()?;
    }
    let left = capabilities(None)?.permitted & CapabilitySet::IPC_LOCK;
    let inheritable = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: left, permitted: left, inheritable })?)
}

fn empty_bounding_set() -> io::Result<()> {
    for number in 0..64 {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // The first one that this kernel does not know.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
