//! A tap device of the kernel's as a port.
//!
//! ```text
//!   named:      none --made, marked as ours, kept by the kernel--> open --orderly end--> removed
//!               there --opened--> open --orderly end--> removed if it bears our mark, else kept
//!   inherited:  open, and never changed but for its headers
//! ```
//!
//! A tap that was made here outlives this process when that is killed, with its addresses and its place in a bridge; the
//! successor finds it by its mark and goes on. Each pair of queues is one file descriptor; those of pairs that the guest
//! does not use are detached, so that no frame goes to them.
//!
//! Invariant: pair 0 is attached as long as the device exists.

mod error;
pub(crate) mod ioctl;
mod link;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use tracing::{debug, info, warn};

use crate::buffers::GuestBuffers;
use crate::config_space::{feature, header_len};
use crate::port::Port;
pub(crate) use error::TapError;
use link::{Change, Link, Links};

/// The mark of taps that were made here: their alias.
const MARK: &str = "made by cleave-net";

const DEFAULT_MTU: u16 = 1500;

/// Which tap.
#[derive(Debug)]
pub(crate) enum TapSource {
    /// By name, with so many queues; made if there is none.
    Name(String, u16),
    /// Queues of one, that whoever started this process has opened.
    Inherited(Vec<OwnedFd>),
}

/// One tap device.
#[derive(Debug)]
pub(crate) struct Tap {
    name: String,
    /// By pair.
    queues: Vec<OwnedFd>,
    /// By pair, whether frames go to it.
    attached: Mutex<Vec<bool>>,
    links: Links,
    /// It is in this process's network namespace; what is known of one that is not is nothing.
    visible: bool,
    /// Its index there: a name may change.
    index: u32,
    /// To be removed in the end.
    ours: bool,
    mtu: u16,
    /// The kernel can segment UDP.
    uso: bool,
}

impl Tap {
    /// Opens it, makes it a port of `bridge`, and sets its MTU.
    pub(crate) fn open(source: TapSource, bridge: Option<&str>, mtu: Option<u16>) -> Result<Self, TapError> {
        let links = Links::open().map_err(TapError::Links)?;
        let mut tap = match source {
            TapSource::Name(name, pairs) => Self::by_name(name, pairs, links)?,
            TapSource::Inherited(queues) => Self::inherited(queues, links)?,
        };
        if let Some(mtu) = mtu {
            tap.set_mtu(mtu)?;
        }
        if let Some(bridge) = bridge {
            tap.join(bridge)?;
        }
        let link = tap.link()?;
        if tap.visible && !link.up {
            warn!("{0} is down, and so is the guest's link: ip link set {0} up", tap.name);
        }
        tap.mtu = u16::try_from(link.mtu).unwrap_or(u16::MAX);
        Ok(tap)
    }

    fn by_name(name: String, pairs: u16, links: Links) -> Result<Self, TapError> {
        let found = links.get(&name).map_err(TapError::Links)?;
        if found.as_ref().is_some_and(|link| !link.is_tun) {
            return Err(TapError::WrongKind(name));
        }
        // A tap with several queues would give some of them to a second program, and with them some of the frames.
        if found.as_ref().is_some_and(|link| link.carrier) {
            return Err(TapError::InUse(name));
        }
        let queues = open_queues(&name, pairs, found.is_some())?;
        let marked = found.as_ref().is_some_and(|link| link.alias == MARK.as_bytes());
        let mut tap = Self::with(name, queues, links, found.is_none() || marked);
        // Asked again: it may just have been made.
        tap.look_up()?;
        if found.is_none() {
            tap.keep()?;
        }
        Ok(tap)
    }

    fn with(name: String, queues: Vec<OwnedFd>, links: Links, ours: bool) -> Self {
        let uso = probe_uso(&queues[0]);
        let attached = Mutex::new(vec![true; queues.len()]);
        Self { name, queues, attached, links, visible: false, index: 0, ours, mtu: DEFAULT_MTU, uso }
    }

    /// Finds out whether the interface of its name here is this one, and which that is.
    fn look_up(&mut self) -> Result<(), TapError> {
        let address = ioctl::hardware_address(&self.queues[0]).unwrap_or_default();
        let link = self.links.get(&self.name).map_err(TapError::Links)?;
        let link = link.filter(|link| link.address == address);
        (self.visible, self.index) = link.map_or((false, 0), |link| (true, link.index));
        Ok(())
    }

    /// Has the kernel keep one that was just made, marked and up.
    fn keep(&self) -> Result<(), TapError> {
        let failed = |source| TapError::SetUp { tap: self.name.clone(), source };
        let index = self.link()?.index;
        self.links.change(index, &Change::Alias(MARK)).map_err(failed)?;
        ioctl::set_persistent(&self.queues[0], true).map_err(failed)?;
        self.links.change(index, &Change::Up).map_err(failed)?;
        info!("made the tap device {}", self.name);
        Ok(())
    }

    fn inherited(queues: Vec<OwnedFd>, links: Links) -> Result<Self, TapError> {
        let wrong = |text: String| TapError::Inherited(text);
        let mut name: Option<String> = None;
        for queue in &queues {
            let number = queue.as_raw_fd();
            let (of, flags) = ioctl::interface(queue).map_err(|error| {
                wrong(format!("descriptor {number} is no queue of a tap device ({error})"))
            })?;
            let needed = ioctl::IFF_TAP | ioctl::IFF_NO_PI | ioctl::IFF_VNET_HDR;
            if flags & needed != needed {
                let text = format!("{of} has to be opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR");
                return Err(wrong(text));
            }
            if name.as_ref().is_some_and(|name| *name != of) {
                return Err(wrong(format!(
                    "descriptor {number} is a queue of {of}, others are of {}",
                    name.unwrap_or_default()
                )));
            }
            name = Some(of);
            let flags = fcntl_getfl(queue).map_err(|errno| wrong(errno.to_string()))?;
            fcntl_setfl(queue, flags | OFlags::NONBLOCK).map_err(|errno| wrong(errno.to_string()))?;
        }
        let name = name.ok_or_else(|| wrong("it is missing".to_owned()))?;
        let mut tap = Self::with(name, queues, links, false);
        tap.look_up()?;
        if !tap.visible {
            info!(
                "{} is in another network namespace: its MTU is taken for {DEFAULT_MTU}, its link for up",
                tap.name
            );
        }
        Ok(tap)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is to be removed in the end.
    pub(crate) fn is_ours(&self) -> bool {
        self.ours
    }

    fn queue(&self, pair: u16) -> BorrowedFd<'_> {
        self.queues[usize::from(pair)].as_fd()
    }

    fn link(&self) -> Result<Link, TapError> {
        let nothing = Link { up: true, mtu: self.mtu.into(), ..Link::default() };
        if !self.visible {
            return Ok(nothing);
        }
        self.links.by_index(self.index).map_err(TapError::Links).map(|link| link.unwrap_or(nothing))
    }

    fn set_mtu(&mut self, mtu: u16) -> Result<(), TapError> {
        let link = self.link()?;
        if !self.visible {
            self.mtu = mtu;
        } else if link.mtu != u32::from(mtu) {
            let failed = |source| TapError::Mtu { tap: self.name.clone(), mtu, source };
            self.links.change(link.index, &Change::Mtu(mtu.into())).map_err(failed)?;
        }
        Ok(())
    }

    fn join(&self, bridge: &str) -> Result<(), TapError> {
        let found = self.links.get(bridge).map_err(TapError::Links)?;
        let found = found.ok_or_else(|| TapError::NoBridge(bridge.to_owned()))?;
        let (tap, bridge) = (self.name.clone(), bridge.to_owned());
        let link = self.link()?;
        match link.master {
            Some(master) if master == found.index => Ok(()),
            Some(_) => Err(TapError::OtherBridge { tap, bridge }),
            None => {
                let failed = |source| TapError::Bridge { tap, bridge, source };
                self.links.change(link.index, &Change::Master(found.index)).map_err(failed)
            }
        }
    }
}

fn open_queues(name: &str, pairs: u16, exists: bool) -> Result<Vec<OwnedFd>, TapError> {
    let flags = ioctl::IFF_TAP | ioctl::IFF_NO_PI | ioctl::IFF_VNET_HDR;
    let mut queues = Vec::new();
    // One that somebody else made may have been made for one queue.
    let mut multi = ioctl::IFF_MULTI_QUEUE;
    while queues.len() < usize::from(pairs) {
        let access = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let queue = open(error::TUN, access, Mode::empty()).map_err(|errno| TapError::NoTun(errno.into()))?;
        let mut made = ioctl::set_interface(&queue, name, flags | multi);
        let wrong = |made: &io::Result<()>| {
            made.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
        };
        if wrong(&made) && exists && pairs == 1 {
            multi = 0;
            made = ioctl::set_interface(&queue, name, flags);
        }
        made.map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM) if exists => TapError::MayNotOpen(name.to_owned()),
            Some(libc::EPERM) => TapError::MayNotMake(name.to_owned()),
            Some(libc::EBUSY) => TapError::InUse(name.to_owned()),
            Some(libc::EINVAL) => TapError::WrongKind(name.to_owned()),
            _ => TapError::Open { name: name.to_owned(), pairs, source: error },
        })?;
        queues.push(queue);
    }
    Ok(queues)
}

/// Linux 6.2 and later.
fn probe_uso(queue: &OwnedFd) -> bool {
    let able = ioctl::set_offload(queue, libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6).is_ok();
    able && ioctl::set_offload(queue, 0).is_ok()
}

/// What the kernel may leave to a guest with these features.
fn offload(features: u64) -> u32 {
    let has = |wanted: u64| features & wanted == wanted;
    if !has(feature::GUEST_CSUM) {
        return 0;
    }
    let mut offload = libc::TUN_F_CSUM;
    for (wanted, flag) in [
        (feature::GUEST_TSO4, libc::TUN_F_TSO4),
        (feature::GUEST_TSO6, libc::TUN_F_TSO6),
        // The kernel knows them together only.
        (feature::GUEST_USO4 | feature::GUEST_USO6, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ] {
        offload |= if has(wanted) { flag } else { 0 };
    }
    let segments_tcp = offload & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) != 0;
    offload | if has(feature::GUEST_ECN) && segments_tcp { libc::TUN_F_TSO_ECN } else { 0 }
}

/// Whether the error says that a queue is detached, or its interface gone.
fn is_detached(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD)
}

impl Port for Tap {
    fn features(&self) -> u64 {
        use feature as f;
        let tcp = f::HOST_TSO4 | f::HOST_TSO6 | f::HOST_ECN | f::GUEST_TSO4 | f::GUEST_TSO6 | f::GUEST_ECN;
        let udp = if self.uso { f::HOST_USO | f::GUEST_USO4 | f::GUEST_USO6 } else { 0 };
        f::CSUM | f::GUEST_CSUM | tcp | udp
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn configure(&self, features: u64) -> io::Result<()> {
        // Both are the device's, whichever queue they are said to.
        ioctl::set_header_len(&self.queues[0], header_len(features))?;
        ioctl::set_offload(&self.queues[0], offload(features))
    }

    fn set_active(&self, pair: u16, active: bool) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(now) = attached.get_mut(usize::from(pair)).filter(|now| pair != 0 && **now != active) else {
            return Ok(());
        };
        ioctl::set_attached(&self.queues[usize::from(pair)], active)?;
        *now = active;
        debug!("queue {pair} of {} is {}", self.name, if active { "attached" } else { "detached" });
        Ok(())
    }

    fn fd(&self, pair: u16) -> Option<BorrowedFd<'_>> {
        Some(self.queue(pair))
    }

    fn receive(&self, pair: u16, buffers: &mut GuestBuffers, spill: &mut [u8]) -> io::Result<usize> {
        buffers.readv(self.queue(pair), spill).map_err(|error| match pair != 0 && is_detached(&error) {
            // No frame comes as long as it is; whoever attaches it wakes the thread.
            true if !self.is_gone() => io::ErrorKind::WouldBlock.into(),
            _ => error,
        })
    }

    fn send(&self, pair: u16, frame: &GuestBuffers) -> io::Result<()> {
        let sent = match frame.writev(self.queue(pair)) {
            // A driver that uses a pair it has not asked for: a frame is a frame.
            Err(error) if pair != 0 && is_detached(&error) => frame.writev(self.queue(0)),
            sent => sent,
        };
        sent.map(drop)
    }

    fn is_gone(&self) -> bool {
        ioctl::interface(&self.queues[0]).is_err_and(|error| is_detached(&error))
    }

    fn link_is_up(&self) -> bool {
        self.links.forget_changes();
        self.link().is_ok_and(|link| link.up)
    }

    fn link_fd(&self) -> Option<BorrowedFd<'_>> {
        self.visible.then(|| self.links.changes_fd())
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = ioctl::set_persistent(&self.queues[0], false)
        {
            debug!("{} stays: {error}", self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_can_do_itself_is_left_to_it() {
        use feature as f;
        assert_eq!(offload(0), 0);
        assert_eq!(offload(f::GUEST_TSO4), 0, "not without checksums");
        assert_eq!(offload(f::GUEST_CSUM | f::GUEST_ECN | f::GUEST_USO4), libc::TUN_F_CSUM);
        let tcp = f::GUEST_CSUM | f::GUEST_TSO6 | f::GUEST_ECN;
        assert_eq!(offload(tcp), libc::TUN_F_CSUM | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN);
        assert_eq!(offload(u64::MAX), 0x6f);
    }
}
