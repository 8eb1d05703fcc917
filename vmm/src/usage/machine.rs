//! Machines that run, and who shares their memory.

use std::io;

use serde::Serialize;

use super::process::Process;
use super::smaps::{FileId, Mapping};

/// One machine's memory. All sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Machine {
    pub pid: u32,
    /// Guest memory, as the guest has it.
    pub guest: u64,
    /// What of it is in the host's RAM.
    pub resident: u64,
    /// What of it is swapped out.
    pub swapped: u64,
    /// What of it is nowhere: never touched, or given back by a balloon or by reporting.
    pub holes: u64,
    /// The VMM first.
    pub processes: Vec<Sharer>,
}

/// A process of the machine: the VMM, a daemon that it has started, or any other that maps the same memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Sharer {
    pub pid: u32,
    pub name: String,
    /// Absent where this user may not look.
    #[serde(flatten)]
    pub figures: Option<Figures>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Figures {
    /// Guest memory in its page tables.
    pub mapped: u64,
    /// As much of that in huge pages.
    pub huge: u64,
    /// Its share (PSS) of all its other memory: what it costs beside the guest's.
    pub own: u64,
    /// What of its other memory is swapped out.
    pub own_swapped: u64,
}

impl Figures {
    fn of(mappings: &[Mapping], memory: FileId) -> Self {
        let mut figures = Self::default();
        for mapping in mappings {
            if mapping.file == memory {
                figures.mapped += mapping.mapped;
                figures.huge += mapping.huge;
            } else {
                figures.own += mapping.pss;
                figures.own_swapped += mapping.swap;
            }
        }
        figures
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum MachineError {
    #[error("{0}: no process has this pid; give that of a `cleave run`, or none for all machines")]
    NoProcess(u32),
    #[error("{pid} ({name}) is no machine; give the pid of a `cleave run`, or none for all machines")]
    NoMachine { pid: u32, name: String },
    #[error("{pid} ({name}) is no machine, but shares the memory of one: give that one's pid, {machine}")]
    Daemon { pid: u32, name: String, machine: u32 },
    #[error("{pid} ({name}) cannot be looked at: run this as root, or as the user it runs as")]
    Forbidden { pid: u32, name: String, source: io::Error },
}

/// The file that is guest memory, if `process` is a VMM of ours whose machine has some.
fn memory_of(process: &Process) -> io::Result<Option<FileId>> {
    if !process.runs() {
        return Ok(None);
    }
    let maps = process.maps()?;
    Ok(maps.iter().find(|mapping| mapping.is_guest_memory()).map(|mapping| mapping.file))
}

/// The machines whose VMM this user may look at.
pub(super) fn all() -> Vec<Machine> {
    let everyone = Process::all();
    let machines = everyone.iter().filter_map(|process| {
        let memory = memory_of(process).ok().flatten()?;
        look(process, memory, &everyone).ok().flatten()
    });
    machines.collect()
}

/// The machine whose VMM is `pid`.
pub(super) fn one(pid: u32) -> Result<Machine, MachineError> {
    let process = Process::of(pid).ok_or(MachineError::NoProcess(pid))?;
    let everyone = Process::all();
    let name = process.name.clone();
    let forbidden = |source| MachineError::Forbidden { pid, name: name.clone(), source };
    match memory_of(&process).map_err(forbidden)? {
        None => Err(no_machine(&process, &everyone)),
        Some(memory) => {
            look(&process, memory, &everyone).map_err(forbidden)?.ok_or(MachineError::NoProcess(pid))
        }
    }
}

/// Why a process is none: most likely it is a machine's daemon.
fn no_machine(process: &Process, everyone: &[Process]) -> MachineError {
    let (pid, name) = (process.pid, process.name.clone());
    let maps = process.maps().unwrap_or_default();
    let memory = maps.iter().find(|mapping| mapping.is_guest_memory()).map(|mapping| mapping.file);
    let owner = everyone.iter().find(|other| {
        let theirs = memory_of(other).ok().flatten();
        theirs.is_some() && (theirs == memory || other.pid == process.parent)
    });
    match owner {
        Some(machine) => MachineError::Daemon { pid, name, machine: machine.pid },
        None => MachineError::NoMachine { pid, name },
    }
}

/// `None` if it has ended meanwhile.
fn look(vmm: &Process, memory: FileId, everyone: &[Process]) -> io::Result<Option<Machine>> {
    let Some((guest, allocated)) = vmm.open_file(memory)? else { return Ok(None) };
    let mappings = vmm.smaps()?;
    // Pages that are swapped out count as allocated. Its mappings cover the whole file, each part once.
    let swapped = mappings.iter().filter(|mapping| mapping.file == memory).map(|mapping| mapping.swap).sum();
    let mut processes =
        vec![Sharer { pid: vmm.pid, name: vmm.name.clone(), figures: Some(Figures::of(&mappings, memory)) }];
    processes.extend(
        everyone
            .iter()
            .filter(|other| other.pid != vmm.pid)
            .filter_map(|other| sharer(other, memory, other.parent == vmm.pid)),
    );
    Ok(Some(Machine {
        pid: vmm.pid,
        guest,
        resident: allocated.saturating_sub(swapped),
        swapped,
        holes: guest.saturating_sub(allocated),
        processes,
    }))
}

/// A process, if it is a child of the machine's or maps its memory.
fn sharer(process: &Process, memory: FileId, child: bool) -> Option<Sharer> {
    let shares = process.maps().is_ok_and(|maps| maps.iter().any(|mapping| mapping.file == memory));
    (shares || child).then(|| Sharer {
        pid: process.pid,
        name: process.name.clone(),
        figures: process.smaps().ok().map(|mappings| Figures::of(&mappings, memory)),
    })
}
