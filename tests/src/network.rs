//! A network of a test's own: a namespace, and a socket on an interface in it, by which the test is the world that a
//! network daemon's tap device leads to.
//!
//! Frames have a virtio-net header here, too (PACKET_VNET_HDR, packet(7)): what the guest is to segment or to sum is seen
//! as it is.
#![expect(unsafe_code, reason = "a namespace for one thread, and addresses of packet sockets")]

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags};
use rustix::thread::UnshareFlags;

/// Bytes of the header before each frame at a packet socket.
pub const PACKET_HEADER_LEN: usize = 10;

/// What the frames of these tests say that they are: for local experiments (IEEE 802, 9.2).
pub const EXPERIMENT: [u8; 2] = [0x88, 0xb5];

/// Puts this thread, and what it starts, into a network of its own in which only the test speaks. `None`, said aloud: this
/// user may not.
pub fn enter() -> Option<()> {
    // SAFETY: nothing here relies on which network this thread is in.
    if let Err(errno) = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) } {
        eprintln!("SKIPPED: a network namespace cannot be made ({errno}): run this as root");
        return None;
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        eprintln!("SKIPPED: there is no /dev/net/tun: modprobe tun");
        return None;
    }
    // Else the kernel has things to say on every interface that comes up. A kernel without IPv6 has no such file.
    for which in ["all", "default"] {
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1");
    }
    Some(())
}

/// Runs ip(8).
///
/// # Panics
/// It fails.
pub fn ip(words: &str) -> String {
    let output =
        Command::new("ip").args(words.split_whitespace()).output().expect("ip(8) is installed (iproute2)");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {words}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Opens a queue of the tap device `name`, which is made if there is none, with or without a virtio-net header before
/// frames.
///
/// # Errors
/// This user may not, or it is of another kind.
pub fn open_tap(name: &str, with_header: bool) -> io::Result<OwnedFd> {
    let fd = fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").map(OwnedFd::from)?;
    let header = if with_header { libc::IFF_VNET_HDR } else { 0 };
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE | header) as libc::c_short;
    let mut request =
        libc::ifreq { ifr_name: [0; 16], ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    request.ifr_name[..15].iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as libc::c_char);
    // SAFETY: TUNSETIFF takes an ifreq.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0 => Ok(fd),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has frames of `tap` pass with a header of 12 bytes, and unsummed and unsegmented where one side leaves that to the other.
///
/// # Errors
/// It was opened without headers.
pub fn offload_all(tap: &OwnedFd) -> io::Result<()> {
    let len: libc::c_int = 12;
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    // SAFETY: TUNSETVNETHDRSZ reads an int, TUNSETOFFLOAD takes a number.
    let failed = unsafe {
        libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) != 0
            || libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(tcp)) != 0
    };
    if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A packet socket on one interface.
pub struct Wire(OwnedFd);

impl Wire {
    /// # Errors
    /// There is no such interface, or this user may not.
    pub fn open(interface: &str) -> io::Result<Self> {
        let every = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: it makes a descriptor, which nobody else has.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, every.into()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just made.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let index = rustix::net::netdevice::name_to_index(&fd, interface)?;
        let set = |option: libc::c_int| {
            let on: libc::c_int = 1;
            // SAFETY: the option is an int, of that length.
            unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_PACKET, option, (&raw const on).cast(), 4) }
        };
        // SAFETY: all zeroes is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = every;
        address.sll_ifindex = index as i32;
        let len = size_of_val(&address) as libc::socklen_t;
        // SAFETY: it is an address of that length.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) };
        if bound < 0 || set(libc::PACKET_VNET_HDR) < 0 || set(libc::PACKET_IGNORE_OUTGOING) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(fd))
    }

    /// Sends a frame to whoever has the tap device open.
    ///
    /// # Errors
    /// Nobody has, or there is no room.
    pub fn send(&self, header: &[u8; PACKET_HEADER_LEN], frame: &[u8]) -> io::Result<()> {
        let bytes = [header, frame].concat();
        rustix::io::write(&self.0, &bytes)?;
        Ok(())
    }

    /// Sends many at once, each behind its header, past the interface's queue; the interface drops what it has no room for.
    /// Gives how many there were.
    ///
    /// # Errors
    /// Nobody has the tap device open, or it is down.
    pub fn send_all(&self, frames: &[&[u8]]) -> io::Result<usize> {
        let slices: Vec<[io::IoSlice<'_>; 1]> =
            frames.iter().map(|frame| [io::IoSlice::new(frame)]).collect();
        let mut nothing: Vec<_> = slices.iter().map(|_| SendAncillaryBuffer::default()).collect();
        let mut messages: Vec<MMsgHdr<'_>> =
            slices.iter().zip(&mut nothing).map(|(slice, nothing)| MMsgHdr::new(slice, nothing)).collect();
        Ok(rustix::net::sendmmsg(&self.0, &mut messages, SendFlags::empty())?)
    }

    /// Has what is sent go straight to the interface's driver.
    ///
    /// # Errors
    /// The kernel is older than 3.14.
    pub fn bypass_queue(&self) -> io::Result<()> {
        let on: libc::c_int = 1;
        // SAFETY: the option is an int, of that length.
        let set = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_QDISC_BYPASS,
                (&raw const on).cast(),
                4,
            )
        };
        if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The next frame from there, with its header; those of the kernel's own are left out.
    pub fn receive(&self, patience: Duration) -> Option<(Vec<u8>, Vec<u8>)> {
        let deadline = Instant::now() + patience;
        let mut bytes = vec![0; 80 << 10];
        loop {
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).ok()?;
            let mut fds = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)];
            if !matches!(poll(&mut fds, Some(&left)), Ok(1..)) {
                return None;
            }
            // A header that the socket cannot tell, or a device that was down for a while, is no frame.
            let Ok(len) = rustix::io::read(&self.0, &mut bytes) else { continue };
            let (header, frame) = bytes[..len].split_at_checked(PACKET_HEADER_LEN)?;
            return Some((header.to_vec(), frame.to_vec()));
        }
    }
}
