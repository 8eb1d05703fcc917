//! A port of the switch as a network device sees it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::frame::Frame;
use super::inlet::Inlet;
use super::{Outlet, PortIndex, Switch};
use crate::buffers::GuestBuffers;
use crate::config_space::header_len;
use crate::port::Port;

#[derive(Debug)]
pub(crate) struct SwitchPort {
    switch: Arc<Switch>,
    index: PortIndex,
    /// Bytes before the frames that the guest sends.
    header: AtomicUsize,
    /// By pair. One thread sends on each, so that nobody ever waits for these locks.
    outlets: Vec<Mutex<Outlet>>,
}

impl SwitchPort {
    pub(crate) fn new(switch: Arc<Switch>, index: PortIndex, pairs: u16) -> Self {
        let outlets = (0..pairs).map(|_| Mutex::default()).collect();
        Self { switch, index, header: AtomicUsize::new(header_len(0).into()), outlets }
    }

    fn with_outlet(&self, pair: u16, what: impl FnOnce(&mut Outlet)) {
        what(&mut self.outlets[usize::from(pair)].lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Port for SwitchPort {
    fn features(&self) -> u64 {
        self.switch.features()
    }

    fn mtu(&self) -> u16 {
        self.switch.mtu()
    }

    fn configure(&self, features: u64) -> io::Result<()> {
        self.header.store(header_len(features).into(), Ordering::Relaxed);
        Ok(())
    }

    fn set_active(&self, pair: u16, active: bool) -> io::Result<()> {
        self.switch.set_active(self.index, pair, active);
        Ok(())
    }

    fn fd(&self, _: u16) -> Option<BorrowedFd<'_>> {
        None
    }

    fn receive(&self, _: u16, _: &mut GuestBuffers, _: &mut [u8]) -> io::Result<usize> {
        // Frames are brought to the inlet.
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn send(&self, pair: u16, frame: &GuestBuffers) -> io::Result<()> {
        let frame = Frame::of_guest(frame, self.header.load(Ordering::Relaxed))
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        self.with_outlet(pair, |outlet| self.switch.forward(self.index, &frame, outlet));
        Ok(())
    }

    fn flush(&self, pair: u16) -> io::Result<()> {
        self.with_outlet(pair, |outlet| self.switch.flush(outlet));
        Ok(())
    }

    fn inlet(&self, pair: u16) -> Option<&Inlet> {
        self.switch.inlet(self.index, pair)
    }

    fn report(&self) -> Option<String> {
        Some(self.switch.report_of(self.index))
    }

    fn is_gone(&self) -> bool {
        false
    }

    fn link_is_up(&self) -> bool {
        true
    }

    fn link_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
