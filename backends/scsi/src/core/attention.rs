//! Unit attentions: what has happened behind an initiator's back (SAM-5, unit attention conditions).
//!
//! Each nexus has its own set. A command that is not exempt reports the foremost one instead of being executed, which
//! takes it off.

use crate::sense::Sense;

/// In the order in which they are reported (SAM-5, their precedence: resets first, then I_T nexus loss,
/// then others).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Attention {
    PowerOn,
    LogicalUnitReset,
    NexusLoss,
    ReportedLunsChanged,
    MediumMayHaveChanged,
    CapacityChanged,
    ModeParametersChanged,
    ReservationsPreempted,
    RegistrationsPreempted,
    ReservationsReleased,
    CommandsCleared,
    RemovalRequested,
}

impl Attention {
    const ALL: [Self; 12] = [
        Self::PowerOn,
        Self::LogicalUnitReset,
        Self::NexusLoss,
        Self::ReportedLunsChanged,
        Self::MediumMayHaveChanged,
        Self::CapacityChanged,
        Self::ModeParametersChanged,
        Self::ReservationsPreempted,
        Self::RegistrationsPreempted,
        Self::ReservationsReleased,
        Self::CommandsCleared,
        Self::RemovalRequested,
    ];

    /// SPC-4, additional sense codes.
    fn sense(self) -> Sense {
        let (code, qualifier) = match self {
            Self::PowerOn => (0x29, 0x00),
            Self::LogicalUnitReset => (0x29, 0x03),
            Self::NexusLoss => (0x29, 0x07),
            Self::ReportedLunsChanged => (0x3f, 0x0e),
            Self::MediumMayHaveChanged => (0x28, 0x00),
            Self::CapacityChanged => (0x2a, 0x09),
            Self::ModeParametersChanged => (0x2a, 0x01),
            Self::ReservationsPreempted => (0x2a, 0x03),
            Self::RegistrationsPreempted => (0x2a, 0x05),
            Self::ReservationsReleased => (0x2a, 0x04),
            Self::CommandsCleared => (0x2f, 0x00),
            Self::RemovalRequested => (0x5a, 0x01),
        };
        Sense::unit_attention(code, qualifier)
    }

    const fn bit(self) -> u16 {
        1 << self as u8
    }
}

/// What one nexus has not been told yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Attentions(u16);

impl Attentions {
    pub(crate) fn establish(&mut self, attention: Attention) {
        self.0 |= attention.bit();
    }

    pub(crate) fn clear(&mut self, attention: Attention) {
        self.0 &= !attention.bit();
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The foremost one, which is told with this. A reset that is told makes the lesser ones old news.
    pub(crate) fn take(&mut self) -> Option<Sense> {
        let first = Attention::ALL.into_iter().find(|attention| self.0 & attention.bit() != 0)?;
        self.clear(first);
        if matches!(first, Attention::PowerOn | Attention::LogicalUnitReset) {
            self.clear(Attention::LogicalUnitReset);
            self.clear(Attention::NexusLoss);
        }
        Some(first.sense())
    }

    pub(crate) fn to_bits(self) -> u16 {
        self.0
    }

    /// Bits that mean nothing are dropped.
    pub(crate) fn from_bits(bits: u16) -> Self {
        Self(bits & ((1 << Self::KINDS) - 1))
    }

    const KINDS: usize = Attention::ALL.len();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_told_once_and_resets_come_first() {
        let mut attentions = Attentions::default();
        for attention in [Attention::CapacityChanged, Attention::NexusLoss, Attention::LogicalUnitReset] {
            attentions.establish(attention);
            attentions.establish(attention);
        }
        assert_eq!(attentions.take(), Some(Sense::unit_attention(0x29, 0x03)));
        assert_eq!(attentions.take(), Some(Sense::unit_attention(0x2a, 0x09)));
        assert_eq!(attentions.take(), None);
        assert!(attentions.is_empty());
    }

    #[test]
    fn hostile_bits_mean_nothing() {
        let mut attentions = Attentions::from_bits(u16::MAX);
        let mut told = 0;
        while attentions.take().is_some() {
            told += 1;
        }
        assert_eq!(told, Attention::ALL.len() - 2);
        assert_eq!(attentions.to_bits(), 0);
    }
}
