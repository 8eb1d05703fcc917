//! A command on its way: what came, what the caller is to do for it, what goes back.
//!
//! ```text
//!   Request --execute--> Done ------------------------------------------------> Answer
//!                  |---> Gather --the caller reads data-out--> resume --> Done, Io or Control
//!                  |---> Io ------the caller moves the data---.
//!                  `---> Control -the caller does the actions--+--> Task::complete --> Answer
//! ```
//!
//! Invariants: an [`Io`] lies inside of the medium as it was when the command came, and its data fits into the buffers
//! that came with the command; a [`Task`] needs nothing of the unit any more, so that I/O completes without its lock.

use crate::sense::{Sense, SenseData};

/// The initiator port that a command came from: together with the one target port there is, the I_T nexus (SAM-5).
///
/// The number is the port's name (NAA, as in a SAS TransportID): persistent reservations are kept by it, so it has to be
/// the same when the initiator comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Nexus(pub u64);

/// How a command wants to be ordered among others (SAM-5, task attributes). The caller orders them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Attribute {
    #[default]
    Simple,
    Ordered,
    HeadOfQueue,
    Aca,
}

/// A command as it came.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub nexus: Nexus,
    /// Of any length and content.
    pub cdb: &'a [u8],
    pub attribute: Attribute,
    /// Bytes that the initiator has to write.
    pub data_out: u64,
    /// Bytes that it has room for.
    pub data_in: u64,
}

/// SAM-5, status codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Good = 0x00,
    CheckCondition = 0x02,
    Busy = 0x08,
    ReservationConflict = 0x18,
    TaskAborted = 0x40,
}

/// The end of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: Status,
    /// With every CHECK CONDITION, and with nothing else.
    pub sense: Option<SenseData>,
    /// For the start of the data-in buffer; it fits. Empty for I/O: its data is there already.
    pub data_in: Vec<u8>,
    /// Bytes of the buffers that were not used.
    pub residual: u64,
}

impl Answer {
    fn without_data(status: Status, residual: u64) -> Self {
        Self { status, sense: None, data_in: Vec::new(), residual }
    }
}

/// Bytes of the medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub offset: u64,
    pub len: u64,
}

/// What to do with the medium. Ranges are in bytes and whole blocks; none is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Io {
    /// To the start of data-in. `fua`: what is in a volatile cache of it has to reach the medium first.
    Read { range: Range, fua: bool },
    /// From the start of data-out. `durable`: complete it only when the data is on the medium.
    Write { range: Range, durable: bool },
    /// Makes all writes that were completed durable.
    Flush,
    /// The data there is of no use any more.
    Unmap { ranges: Vec<Range>, durable: bool },
    /// Reads as zeroes then. `unmap`: give up the room, if that does it.
    WriteZeroes { range: Range, unmap: bool, durable: bool },
    /// The same block all over.
    WriteSame { range: Range, pattern: Box<[u8]>, durable: bool },
    /// Can it be read?
    Verify { range: Range },
    /// Is it what data-out holds?
    Compare { range: Range },
    /// Is each of its blocks this one?
    CompareSame { range: Range, pattern: Box<[u8]> },
    /// If it is what the first `range.len` bytes of data-out hold, the next `range.len` bytes are written; nothing else
    /// comes between.
    CompareAndWrite { range: Range, durable: bool },
}

/// What to do beside moving data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// All tasks of these on this logical unit end, except the one that brings this.
    Abort(Vec<Nexus>),
    /// As [`Io::Flush`].
    Flush,
    /// The unit's state has changed in a way that a successor has to know: keep it before the answer goes out.
    Save(Box<crate::State>),
    /// The initiator has taken the medium out: the caller lets go of it, too.
    Ejected,
    /// The initiator has closed the tray: if the caller has a medium for it, it loads it ([`crate::Unit::load`]).
    Closed,
}

/// What happens next.
#[derive(Debug)]
pub enum Step {
    Done(Answer),
    /// Take `len` bytes from the start of data-out (there are so many) and call [`crate::Unit::resume`].
    Gather {
        len: usize,
        command: Gathering,
    },
    /// Do it and call [`Task::complete`].
    Io {
        io: Io,
        task: Task,
    },
    /// Do all of them, in order, and call [`Task::complete`]; with the first failure, if one fails.
    Control {
        actions: Vec<Action>,
        task: Task,
    },
    /// The command moves more bytes than the buffers have: it was not executed, and the transport says so.
    Overrun {
        needed: u64,
    },
}

/// A command that waits for its parameters. The unit may change meanwhile: it is looked at again.
#[derive(Debug, Clone)]
pub struct Gathering {
    pub(crate) nexus: Nexus,
    pub(crate) cdb: crate::cdb::Cdb,
    pub(crate) data_out: u64,
    pub(crate) data_in: u64,
    pub(crate) len: usize,
}

/// How I/O, or an action, went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The medium cannot be read or written. `at`: the first byte of it that is concerned, if that is known.
    Medium { at: Option<u64> },
    /// There is no room on the host.
    NoSpace,
    /// The host does not let us write.
    WriteProtected,
    /// The first byte of data-out that is not what the medium holds.
    Miscompare { at: u64 },
    /// A task management function, or a PREEMPT AND ABORT, has named it.
    Aborted,
    /// Not now: the initiator tries again.
    Busy,
    /// Anything else.
    Internal,
}

/// What the answer to a command needs to be made.
#[derive(Debug)]
pub struct Task {
    /// Bytes of the buffers, both ways.
    pub(crate) buffers: u64,
    /// How many of them are used if all goes well.
    pub(crate) used: u64,
    pub(crate) writes: bool,
    pub(crate) block_size: u32,
    pub(crate) descriptor_sense: bool,
}

impl Task {
    /// The answer to the command.
    pub fn complete(self, outcome: Result<(), Failure>) -> Answer {
        let sense = match outcome {
            Ok(()) => return Answer::without_data(Status::Good, self.buffers - self.used),
            Err(Failure::Aborted) => return Answer::without_data(Status::TaskAborted, self.buffers),
            Err(Failure::Busy) => return Answer::without_data(Status::Busy, self.buffers),
            Err(Failure::Medium { at }) => {
                let error = if self.writes { Sense::WRITE_ERROR } else { Sense::UNRECOVERED_READ_ERROR };
                error.with_information(at.map(|at| at / u64::from(self.block_size.max(1))))
            }
            Err(Failure::NoSpace) => Sense::SPACE_ALLOCATION_FAILED,
            Err(Failure::WriteProtected) => Sense::WRITE_PROTECTED,
            Err(Failure::Miscompare { at }) => Sense::MISCOMPARE.with_information(Some(at)),
            Err(Failure::Internal) => Sense::INTERNAL_TARGET_FAILURE,
        };
        check_condition(sense, self.descriptor_sense, self.buffers)
    }
}

pub(crate) fn check_condition(sense: Sense, descriptor: bool, residual: u64) -> Answer {
    let sense = Some(sense.encode(descriptor));
    Answer { sense, ..Answer::without_data(Status::CheckCondition, residual) }
}

pub(crate) fn conflict(residual: u64) -> Answer {
    Answer::without_data(Status::ReservationConflict, residual)
}

/// A command inside of the unit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cmd<'a> {
    pub(crate) nexus: Nexus,
    pub(crate) cdb: &'a crate::cdb::Cdb,
    pub(crate) data_out: u64,
    pub(crate) data_in: u64,
    /// What was gathered.
    pub(crate) list: Option<&'a [u8]>,
}

/// What a command's own function says.
#[derive(Debug)]
pub(crate) enum Reply {
    Good,
    /// Parameter data, of which as much goes out as `allocation` has room for.
    Data {
        bytes: Vec<u8>,
        allocation: u64,
    },
    Io {
        io: Io,
        used: u64,
    },
    /// Without actions it is done, and has used that much of data-out.
    Control {
        actions: Vec<Action>,
        used: u64,
    },
    Gather(usize),
}

/// Why a command's own function says nothing.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Sense(Sense),
    Conflict,
    Overrun { needed: u64 },
}

impl From<Sense> for Refusal {
    fn from(sense: Sense) -> Self {
        Self::Sense(sense)
    }
}

pub(crate) type Outcome = Result<Reply, Refusal>;

/// The first use of the parameters: they are there, or are to be gathered.
pub(crate) enum Parameters<'a> {
    Here(&'a [u8]),
    ToGather(Reply),
}

impl<'a> Cmd<'a> {
    /// `len` bytes of parameters, of which the initiator has to have sent so many.
    pub(crate) fn parameters(&self, len: usize) -> Result<Parameters<'a>, Refusal> {
        match self.list {
            Some(list) if list.len() >= len => Ok(Parameters::Here(&list[..len])),
            _ if len as u64 > self.data_out => Err(Refusal::Overrun { needed: len as u64 }),
            _ => Ok(Parameters::ToGather(Reply::Gather(len))),
        }
    }

    /// Makes the step of what a command's own function has said. `descriptor`: the format of sense data.
    pub(crate) fn step(&self, outcome: Outcome, descriptor: bool, block_size: u32) -> Step {
        let buffers = self.data_out.saturating_add(self.data_in);
        let task = |used, writes| Task { buffers, used, writes, block_size, descriptor_sense: descriptor };
        match outcome {
            Ok(Reply::Good) => Step::Done(Answer::without_data(Status::Good, buffers)),
            Ok(Reply::Data { mut bytes, allocation }) => {
                let room = usize::try_from(allocation.min(self.data_in)).unwrap_or(usize::MAX);
                bytes.truncate(room);
                let residual = buffers - bytes.len() as u64;
                Step::Done(Answer { data_in: bytes, ..Answer::without_data(Status::Good, residual) })
            }
            Ok(Reply::Io { io, used }) => {
                let reads = matches!(
                    io,
                    Io::Read { .. } | Io::Verify { .. } | Io::Compare { .. } | Io::CompareSame { .. }
                );
                Step::Io { io, task: task(used, !reads) }
            }
            Ok(Reply::Control { actions, used }) if actions.is_empty() => {
                Step::Done(Answer::without_data(Status::Good, buffers - used))
            }
            Ok(Reply::Control { actions, used }) => Step::Control { actions, task: task(used, true) },
            Ok(Reply::Gather(len)) => {
                let &Self { nexus, cdb, data_out, data_in, .. } = self;
                Step::Gather { len, command: Gathering { nexus, cdb: *cdb, data_out, data_in, len } }
            }
            Err(Refusal::Sense(sense)) => Step::Done(check_condition(sense, descriptor, buffers)),
            Err(Refusal::Conflict) => Step::Done(conflict(buffers)),
            Err(Refusal::Overrun { needed }) => Step::Overrun { needed },
        }
    }
}
