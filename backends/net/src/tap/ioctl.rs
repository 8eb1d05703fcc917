//! What the kernel's TUN/TAP driver is asked (Documentation/networking/tuntap.rst). Not by a crate: those there are know
//! neither virtio-net headers nor queues that come and go, and it is seven calls.
#![expect(unsafe_code, reason = "ioctls")]

use std::ffi::{c_int, c_short};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::ioctl::{IntegerSetter, Opcode, Setter, Updater, ioctl};

pub(super) use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR};

const SETIFF: Opcode = libc::TUNSETIFF as Opcode;
const GETIFF: Opcode = libc::TUNGETIFF as Opcode;
const SETPERSIST: Opcode = libc::TUNSETPERSIST as Opcode;
const SETOFFLOAD: Opcode = libc::TUNSETOFFLOAD as Opcode;
const SETVNETHDRSZ: Opcode = libc::TUNSETVNETHDRSZ as Opcode;
const SETQUEUE: Opcode = libc::TUNSETQUEUE as Opcode;
const GETHWADDR: Opcode = libc::SIOCGIFHWADDR as Opcode;

/// Those that are needed while frames flow.
pub(crate) const SERVING: &[u64] =
    &[libc::TUNGETIFF, libc::TUNSETOFFLOAD, libc::TUNSETVNETHDRSZ, libc::TUNSETQUEUE];

/// And to remove the tap device in the end.
pub(crate) const SERVING_OURS: &[u64] =
    &[libc::TUNGETIFF, libc::TUNSETOFFLOAD, libc::TUNSETVNETHDRSZ, libc::TUNSETQUEUE, libc::TUNSETPERSIST];

/// Bytes of an interface's name, with the NUL behind it.
const NAME_LEN: usize = libc::IFNAMSIZ;

fn request(name: &str, flags: c_int) -> libc::ifreq {
    let mut chars = [0; NAME_LEN];
    // The last one stays a NUL.
    chars[..NAME_LEN - 1].iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as _);
    libc::ifreq { ifr_name: chars, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags as c_short } }
}

/// Makes `fd` a queue of the interface `name`, which comes into being if there is none.
pub(super) fn set_interface(fd: &OwnedFd, name: &str, flags: c_int) -> io::Result<()> {
    let mut request = request(name, flags);
    // SAFETY: TUNSETIFF reads and writes an ifreq.
    Ok(unsafe { ioctl(fd, Updater::<SETIFF, _>::new(&mut request)) }?)
}

/// The interface that `fd` is a queue of: its name and flags.
pub(super) fn interface(fd: impl AsFd) -> io::Result<(String, c_int)> {
    let mut request = request("", 0);
    // SAFETY: TUNGETIFF writes an ifreq.
    unsafe { ioctl(fd, Updater::<GETIFF, _>::new(&mut request)) }?;
    let name = request.ifr_name.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect::<Vec<_>>();
    // SAFETY: TUNGETIFF fills in the flags, and any bits are some.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((String::from_utf8_lossy(&name).into_owned(), c_int::from(flags as u16)))
}

/// The interface's own Ethernet address.
pub(super) fn hardware_address(fd: impl AsFd) -> io::Result<[u8; 6]> {
    let mut request = request("", 0);
    // SAFETY: SIOCGIFHWADDR writes an ifreq.
    unsafe { ioctl(fd, Updater::<GETHWADDR, _>::new(&mut request)) }?;
    // SAFETY: it fills in the address, and any bytes are one.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    Ok(std::array::from_fn(|at| data[at] as u8))
}

/// Whether the interface stays when nobody has it open.
pub(super) fn set_persistent(fd: &OwnedFd, persistent: bool) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes a number.
    Ok(unsafe { ioctl(fd, IntegerSetter::<SETPERSIST>::new_usize(persistent.into())) }?)
}

/// What the frames that we read may leave to us.
pub(super) fn set_offload(fd: &OwnedFd, offload: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes a number.
    Ok(unsafe { ioctl(fd, IntegerSetter::<SETOFFLOAD>::new_usize(offload as usize)) }?)
}

/// Bytes of the header before each frame.
pub(super) fn set_header_len(fd: &OwnedFd, len: u8) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads an int.
    Ok(unsafe { ioctl(fd, Setter::<SETVNETHDRSZ, c_int>::new(len.into())) }?)
}

/// Whether frames go to this queue.
pub(super) fn set_attached(fd: &OwnedFd, attached: bool) -> io::Result<()> {
    let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    let mut request = request("", flag);
    // SAFETY: TUNSETQUEUE reads an ifreq.
    Ok(unsafe { ioctl(fd, Updater::<SETQUEUE, _>::new(&mut request)) }?)
}
