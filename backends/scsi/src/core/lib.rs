//! The SCSI core of cleave-scsi: what a target says and does for each command, and nothing of how commands come, where
//! data is, or who waits. It knows no virtio, no file and no clock; it is tested from the tables of the standards.
//!
//! - SPC-4 (r36f): INQUIRY, mode pages, sense data, persistent reservations, what is supported.
//! - SBC-3 (r36): disks. MMC-6: CD-ROM and DVD drives. SAM-5: statuses, unit attentions, task management.
//!
//! Clauses are cited by number of these revisions of SPC-4 and SBC-3, and otherwise by the name of the command, page or
//! field: numbers move from revision to revision.
//!
//! A [`Target`] has [`Unit`]s by [`Lun`]; a [`Unit`] keeps what each initiator ([`Nexus`]) has not been told yet, its mode
//! pages and its reservations. A command is a [`Request`] and becomes a [`Step`]: an answer, or I/O that the caller does
//! on the initiator's own buffers.
//!
//! ```
//! use cleave_scsi::{Attribute, Disk, Identity, Io, Lun, Medium, Nexus, Request, Status, Step, Target, Unit};
//!
//! // A disk of 8 blocks in memory, each filled with its number.
//! let disk: Vec<u8> = (0..8).flat_map(|block| [block; 512]).collect();
//! let medium = Medium { blocks: 8, read_only: true };
//! let unit = Unit::disk(Identity::new("example", "0001", None)?, Disk::new(512), Some(medium))?;
//! let mut target = Target::new();
//! target.add(Lun::ZERO, unit).expect("the LUN is free");
//!
//! let mut send = |cdb: &[u8], data_in: &mut [u8]| {
//!     let len = data_in.len() as u64;
//!     let request = Request { nexus: Nexus(1), cdb, attribute: Attribute::Simple, data_out: 0, data_in: len };
//!     match target.execute(Lun::ZERO, &request) {
//!         Step::Io { io: Io::Read { range, .. }, task } => {
//!             let (start, len) = (range.offset as usize, range.len as usize);
//!             data_in[..len].copy_from_slice(&disk[start..start + len]);
//!             task.complete(Ok(()))
//!         }
//!         Step::Done(answer) => answer,
//!         other => unreachable!("{other:?}"),
//!     }
//! };
//! // TEST UNIT READY: a new initiator is told that power has come.
//! assert_eq!(send(&[0; 6], &mut []).status, Status::CheckCondition);
//! // READ (10) of one block at 5.
//! let mut data = [0; 1024];
//! let answer = send(&[0x28, 0, 0, 0, 0, 5, 0, 0, 1, 0], &mut data);
//! assert_eq!((answer.status, answer.residual, data[511]), (Status::Good, 512, 5));
//! # Ok::<(), cleave_scsi::ConfigError>(())
//! ```
//!
//! No crate for CDBs is used: those on crates.io (`scsi`, `libscsi`, `usbd_scsi`) build CDBs for an initiator, or are
//! bound to USB mass storage and its dozen commands; none is kept for targets.
//!
//! # How the daemon uses it
//!
//! virtio-scsi is virtio 1.2, 5.6.
//!
//! **Addresses.** The eight bytes of a request's `lun` are `1, target, LUN`: byte 1 chooses a [`Target`], bytes 2 and 3 are
//! for [`Lun::decode`], 4 to 7 are zero. Anything else, and a target that is not there, is answered with
//! `VIRTIO_SCSI_S_BAD_TARGET`; a LUN that is not there is not: [`Target::execute`] knows what to say. `C1 01` is the
//! well known LUN REPORT LUNS, which is not offered. The initiator is one for a session, so its [`Nexus`] may be any number
//! that stays the same over restarts: a world wide name made from the machine's UUID.
//!
//! **Commands.** `data_out` and `data_in` are the bytes of the buffers behind the request's and the response's header.
//! `task_attr` is an [`Attribute`]; `crn` and `prio` mean nothing here. There is one task set a unit, and the control page
//! says that simple tasks may be reordered, so: SIMPLE starts at once; ORDERED starts when all of the unit's earlier tasks
//! are done, and later ones wait for it; HEAD OF QUEUE starts at once, whatever waits.
//!
//! ```text
//! match target.execute(lun, &request) {
//!     Step::Done(answer) => respond(answer),
//!     Step::Gather { len, command } => target.resume(lun, &command, first_bytes_of_data_out(len)),  // and again
//!     Step::Io { io, task } => { engine.submit(tag, io); pending[tag] = task }  // respond(task.complete(result)) later
//!     Step::Control { actions, task } => respond(task.complete(do_all_in_order(actions))),
//!     Step::Overrun { .. } => response = VIRTIO_SCSI_S_OVERRUN,
//! }
//! ```
//!
//! An [`Answer`] is a response: `status`, `sense` (cut to the device's `sense_size`), `residual` (cut to 32 bits), its
//! `data_in` at the start of the data-in buffer, `VIRTIO_SCSI_S_OK`. The unit is locked inside of `execute` and `resume` only,
//! for as long as a command is looked at; [`Task::complete`] needs no lock. [`Io::CompareAndWrite`] is atomic if the
//! caller keeps other writes of its range away.
//!
//! **Task management.** `VIRTIO_SCSI_T_TMF_*` become [`TaskManagement`]: ABORT_TASK, ABORT_TASK_SET, CLEAR_TASK_SET,
//! I_T_NEXUS_RESET, LOGICAL_UNIT_RESET, QUERY_TASK, QUERY_TASK_SET; CLEAR_ACA is `FUNCTION_REJECTED`.
//! [`TaskManagement::names`] says of each request in flight whether the function means it. Those that are ended are taken
//! back from the engine, or waited for if the kernel has them, and respond with `VIRTIO_SCSI_S_ABORTED` (after a reset:
//! `VIRTIO_SCSI_S_RESET`), since TAS is 0; then [`Target::manage`], then the function responds with `FUNCTION_COMPLETE`. The
//! queries respond with `FUNCTION_SUCCEEDED` if a task is named. No such LUN: `INCORRECT_LUN`.
//! [`Action::Abort`], of PREEMPT AND ABORT, is the same for all tasks of some nexuses on one unit.
//!
//! **Events.** [`Target::add`] and [`Target::remove`] go with `VIRTIO_SCSI_T_TRANSPORT_RESET` (rescan, removed),
//! [`Unit::resize`] with `VIRTIO_SCSI_T_PARAM_CHANGE` and the sense code 2A/09, [`Unit::load`] and [`Unit::eject`] with 28/00.
//!
//! **Lifetimes.** A reset of the device is [`Unit::reset`] with [`Reset::Hard`] once nothing is in flight. What a successor of
//! this process has to know is [`Unit::state`], which [`Action::Save`] brings when a command changes it; whoever changes a
//! unit through its other functions saves it then. [`Unit::restore`] takes it back, whatever it has become; then
//! [`Unit::introduce`] for the nexus of the requests that were in flight, which is not to hear of a power on.

mod attention;
mod blocks;
mod cd;
mod cdb;
mod commands;
mod config;
mod inquiry;
mod management;
mod mode;
mod removal;
mod report;
mod reservations;
mod sense;
mod state;
mod target;
mod task;
mod unit;

pub use config::{ConfigError, Disk, Identity, Medium, Unmap, WriteCache};
pub use management::{TaskManagement, TaskName};
pub use sense::{Field, Sense, SenseData, SenseKey};
pub use state::{Restart, State, StateError};
pub use target::{Lun, NoSuchLun, Target};
pub use task::{
    Action, Answer, Attribute, Failure, Gathering, Io, Nexus, Range, Request, Status, Step, Task,
};
pub use unit::{EjectError, Reset, Unit};

#[cfg(test)]
mod tests;
