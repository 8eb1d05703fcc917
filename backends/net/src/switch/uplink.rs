//! The switch's way to the world: a tap device, and a thread that takes in what comes from there.
//!
//! The kernel does not say where a frame goes before it is read, so that one from here is read into this thread's own memory
//! first, and copied from there; one to it is written from where its sender has it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use cleave_common::sandbox::{drop_memory_lock, name_thread};
use cleave_common::vhost_user::features::virtio::VERSION_1;
use cleave_runtime::GuestMemory;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::frame::Frame;
use super::{Outlet, Switch};
use crate::buffers::GuestBuffers;
use crate::config_space::feature;
use crate::port::Port;
use crate::queue::{end_if_gone, give_up};
use crate::tap::Tap;

/// Room for the largest frame, with its header.
const ROOM: usize = 68 << 10;

/// Most frames after which guests learn of them.
const BATCH: usize = 64;

#[derive(Debug)]
pub(crate) struct Uplink {
    tap: Tap,
    received: AtomicU64,
    malformed: AtomicU64,
    /// Frames from here that were for nobody.
    pub(super) for_nobody: AtomicU64,
    sent: AtomicU64,
    /// Frames that the kernel did not take.
    failed: AtomicU64,
}

impl Uplink {
    /// # Errors
    /// The tap device cannot leave to guests what these can do.
    pub(crate) fn new(tap: Tap) -> io::Result<Self> {
        tap.configure(VERSION_1 | feature::GUEST_CSUM | feature::GUEST_GSO)?;
        Ok(Self {
            tap,
            received: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            for_nobody: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        })
    }

    pub(super) fn features(&self) -> u64 {
        self.tap.features()
    }

    pub(super) fn mtu(&self) -> u16 {
        self.tap.mtu()
    }

    /// Sends a frame to the world, or drops it.
    pub(super) fn send(&self, frame: &Frame<'_>) {
        let Some(fd) = self.tap.fd(0) else { return };
        let count = match frame.write_to(fd) {
            Ok(()) => &self.sent,
            Err(error) => {
                end_if_gone(&self.tap, &error);
                &self.failed
            }
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn report(&self) -> String {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        format!(
            "{}: {} frames received (dropped: {} malformed, {} for nobody), {} sent (dropped: {} not taken)",
            self.tap.name(),
            of(&self.received),
            of(&self.malformed),
            of(&self.for_nobody),
            of(&self.sent),
            of(&self.failed),
        )
    }

    /// Reads the next frame with its header. `None`: there is none now.
    fn read(&self, nothing: &mut GuestBuffers, room: &mut [u8]) -> Option<usize> {
        match self.tap.receive(0, nothing, room) {
            Ok(len) => Some(len),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => {
                end_if_gone(&self.tap, &error);
                Some(0)
            }
        }
    }
}

/// The thread that takes in frames. It ends when this is dropped.
pub(crate) struct UplinkThread {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl UplinkThread {
    pub(crate) fn start(switch: Arc<Switch>, uplink: Arc<Uplink>) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let stopped = stop.clone();
        let (ready, is_ready) = mpsc::channel();
        let thread = thread::Builder::new().name("uplink".to_owned()).spawn(move || {
            name_thread("queue");
            let _ = ready.send(drop_memory_lock());
            serve(&switch, &uplink, &stopped);
        })?;
        // Starting a thread takes system calls that serving does not.
        is_ready.recv().map_err(io::Error::other)??;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for UplinkThread {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(switch: &Switch, uplink: &Uplink, stop: &OwnedFd) {
    let mut room = vec![0; ROOM];
    let mut nothing = GuestBuffers::new(Arc::<GuestMemory>::default());
    let mut outlet = Outlet::default();
    let Some(tap) = uplink.tap.fd(0) else { return };
    loop {
        for _ in 0..BATCH {
            let Some(len) = uplink.read(&mut nothing, &mut room) else { break };
            match Frame::of_kernel(&room[..len]) {
                Ok(frame) => {
                    uplink.received.fetch_add(1, Ordering::Relaxed);
                    switch.forward(switch.uplink_index(), &frame, &mut outlet);
                }
                Err(_) => {
                    uplink.malformed.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        switch.flush(&mut outlet);
        let mut fds = [PollFd::new(stop, PollFlags::IN), PollFd::from_borrowed_fd(tap, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[0].revents().is_empty() => return,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => give_up("waiting for the tap device failed", &errno.into()),
        }
    }
}
