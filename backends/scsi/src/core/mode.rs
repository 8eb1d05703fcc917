//! Mode pages: what a unit's behaviour is, and what an initiator may change of it (SPC-4, 7.5, and
//! the mode parameters of SBC-3 and MMC-6).

pub(crate) mod select;
pub(crate) mod sense;

use crate::unit::{Kind, Unit};

/// What initiators have chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Modes {
    /// WCE.
    pub(crate) write_cache: bool,
    /// SWP.
    pub(crate) software_write_protect: bool,
    /// D_SENSE.
    pub(crate) descriptor_sense: bool,
}

impl Modes {
    pub(crate) fn new(write_cache: bool) -> Self {
        Self { write_cache, software_write_protect: false, descriptor_sense: false }
    }
}

/// Which values (PC; SPC-4, 6.13). Nothing is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Values {
    Current,
    /// Ones where MODE SELECT may change something.
    Changeable,
    Default,
}

const READ_WRITE_ERROR_RECOVERY: u8 = 0x01;
const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const INFORMATIONAL_EXCEPTIONS: u8 = 0x1c;
const CD_CAPABILITIES: u8 = 0x2a;

/// All pages, with this code.
const ALL: u8 = 0x3f;

/// In the caching page (SBC-3).
const WCE: (usize, u8) = (2, 1 << 2);
/// In the control page (SPC-4, 7.5.8).
const D_SENSE: (usize, u8) = (2, 1 << 2);
const SWP: (usize, u8) = (4, 1 << 3);

fn flag((at, bit): (usize, u8), page: &[u8]) -> bool {
    page[at] & bit != 0
}

impl Unit {
    /// The codes of its pages, in the order in which they are told.
    fn page_codes(&self) -> &'static [u8] {
        match self.kind {
            Kind::Disk(_) => &[READ_WRITE_ERROR_RECOVERY, CACHING, CONTROL, INFORMATIONAL_EXCEPTIONS],
            Kind::Cd => &[READ_WRITE_ERROR_RECOVERY, CD_CAPABILITIES],
        }
    }

    pub(crate) fn can_switch_write_cache(&self) -> bool {
        matches!(&self.kind, Kind::Disk(disk) if disk.write_cache.switchable)
    }

    /// A page with its header. There is one for each of [`Unit::page_codes`].
    fn page(&self, code: u8, values: Values) -> Vec<u8> {
        let mut page = match code {
            CACHING => vec![0; 20],
            CD_CAPABILITIES => vec![0; 22],
            _ => vec![0; 12],
        };
        (page[0], page[1]) = (code, page.len() as u8 - 2);
        match (code, values) {
            (CACHING, _) => self.caching(&mut page, values),
            (CONTROL, _) => self.control(&mut page, values),
            (_, Values::Changeable) => {}
            // DEXCPT: there are no failure predictions.
            (INFORMATIONAL_EXCEPTIONS, _) => page[2] = 1 << 3,
            (CD_CAPABILITIES, _) => self.cd_capabilities(&mut page),
            _ => {}
        }
        page
    }

    fn caching(&self, page: &mut [u8], values: Values) {
        let enabled = match (values, &self.kind) {
            (Values::Changeable, _) => self.can_switch_write_cache(),
            (Values::Current, _) => self.modes.write_cache,
            (Values::Default, Kind::Disk(disk)) => disk.write_cache.enabled,
            (Values::Default, Kind::Cd) => false,
        };
        page[WCE.0] = if enabled { WCE.1 } else { 0 };
    }

    fn control(&self, page: &mut [u8], values: Values) {
        /// Log pages are not saved implicitly.
        const GLTSD: u8 = 1 << 1;
        /// QUEUE ALGORITHM MODIFIER: simple tasks may be done in any order.
        const UNRESTRICTED_REORDERING: u8 = 1 << 4;
        let modes = match values {
            Values::Changeable => {
                (page[D_SENSE.0], page[SWP.0]) = (D_SENSE.1, SWP.1);
                return;
            }
            Values::Current => self.modes,
            Values::Default => Modes::new(false),
        };
        page[2] = GLTSD | if modes.descriptor_sense { D_SENSE.1 } else { 0 };
        page[3] = UNRESTRICTED_REORDERING;
        page[SWP.0] = if modes.software_write_protect { SWP.1 } else { 0 };
    }

    /// CD capabilities and mechanical status (page 2Ah of MMC-3; drivers still ask for it). Writing, audio and several
    /// sessions are not among them.
    fn cd_capabilities(&self, page: &mut [u8]) {
        /// Of 176 kB/s each, at 48 times the speed of an audio CD.
        const SPEED: u16 = 48 * 176;
        const BUFFER_KIB: u16 = 2048;
        /// CD-R, CD-RW, DVD-ROM, DVD-R and DVD-RAM can be read.
        const READS: u8 = 0x3b;
        const LOCK: u8 = 1 << 0;
        const LOCK_STATE: u8 = 1 << 1;
        const EJECT: u8 = 1 << 3;
        const TRAY: u8 = 1 << 5;
        page[2] = READS;
        page[6] = LOCK | EJECT | TRAY | if self.is_locked() { LOCK_STATE } else { 0 };
        for (at, value) in [(8, SPEED), (12, BUFFER_KIB), (14, SPEED)] {
            crate::cdb::put(page, at, value.to_be_bytes());
        }
    }
}
