//! Where frames go to and come from: a tap device, a switch, passt. Whatever has frames can be one that makes and reads the
//! guest's header.

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::event::epoll::EventFlags;

use crate::buffers::GuestBuffers;
use crate::switch::inlet::Inlet;

/// What is between the guest and the world, by pairs of queues. Shared by all queues' threads; no call waits.
pub(crate) trait Port: Debug + Send + Sync {
    /// Feature bits that depend on what is behind it ([`crate::config_space::feature`]).
    fn features(&self) -> u64;

    /// Bytes of the largest frame, without its Ethernet header.
    fn mtu(&self) -> u16;

    /// Makes the headers of frames those that a guest with these features reads and writes. No queue runs.
    ///
    /// # Errors
    /// It cannot: frames would be misread.
    fn configure(&self, features: u64) -> io::Result<()>;

    /// Whether frames are to come for pair `pair`. Pair 0's always come.
    ///
    /// # Errors
    /// It cannot have so many pairs.
    fn set_active(&self, pair: u16, active: bool) -> io::Result<()>;

    /// Readable, or writable, when pair `pair` has a frame, or room for one. `None`: it always has room, and frames are
    /// brought to its [`Port::inlet`].
    fn fd(&self, pair: u16) -> Option<BorrowedFd<'_>>;

    /// Where others put frames for pair `pair`, if it does not have them received.
    fn inlet(&self, pair: u16) -> Option<&Inlet> {
        let _ = pair;
        None
    }

    /// What to wait for when pair `pair` has had no room: [`Port::fd`], to be writable, unless that is another one.
    fn room(&self, pair: u16) -> Option<(BorrowedFd<'_>, EventFlags)> {
        self.fd(pair).map(|fd| (fd, EventFlags::OUT))
    }

    /// Takes the next frame, behind its header, into `buffers`, and what does not fit there into `spill`. Gives the bytes.
    ///
    /// # Errors
    /// `WouldBlock` when there is none now; others concern one frame, unless [`Port::is_gone`].
    fn receive(&self, pair: u16, buffers: &mut GuestBuffers, spill: &mut [u8]) -> io::Result<usize>;

    /// Sends the one frame in `frame`, behind its header.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room now; others concern this frame, unless [`Port::is_gone`].
    fn send(&self, pair: u16, frame: &GuestBuffers) -> io::Result<()>;

    /// Has all that [`Port::send`] took go out, where it may keep frames, or the rest of one: the next ones may take a while.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room now: wait for some.
    fn flush(&self, pair: u16) -> io::Result<()> {
        let _ = pair;
        Ok(())
    }

    /// Whether it is no more, and will not come back to this process.
    fn is_gone(&self) -> bool;

    /// Whether frames can pass. Readable is [`Port::link_fd`] when that may have changed, and not any more after this.
    fn link_is_up(&self) -> bool;

    /// See [`Port::link_is_up`]; `None` if it is always up.
    fn link_fd(&self) -> Option<BorrowedFd<'_>>;

    /// How it is, for an administrator, where there is more to say than the link.
    fn report(&self) -> Option<String> {
        None
    }
}
