//! Interrupts for guests whose rings other threads fill than those that tell them of it.
//!
//! A frontend's descriptors are whatever it says they are, and may be ones whose write waits. Whoever serves several
//! frontends on one thread pushes there, and has a thread of each frontend's own raise the interrupts.

use super::{Notifier, RingError, Vring};

/// The frontend's ends of one ring's notifications.
#[derive(Debug, Clone)]
pub struct Caller {
    call: Notifier,
    err: Notifier,
    /// Whoever reads the dirty log, while there is one.
    log: Option<Notifier>,
}

impl Caller {
    /// Interrupts the guest.
    pub fn call(&self) {
        if let Some(log) = &self.log {
            log.signal();
        }
        self.call.signal();
    }

    /// As [`Vring::signal_broken`].
    pub fn signal_broken(&self) {
        self.err.signal();
    }
}

impl Vring {
    /// By what another thread tells the frontend of this ring, as long as that runs.
    pub fn caller(&self) -> Caller {
        let log = self.log.as_ref().map(|log| log.call());
        Caller { call: self.call.clone(), err: self.err.clone(), log }
    }

    /// As [`Vring::signal_used`], for whoever sees to it that [`Caller::call`] comes after. `true`: it is due.
    ///
    /// # Errors
    /// As there.
    pub fn owes_a_call(&mut self) -> Result<bool, RingError> {
        let logged = self.log.is_some() && self.ring.has_unsignalled();
        Ok(self.ring.should_signal() || logged)
    }
}
