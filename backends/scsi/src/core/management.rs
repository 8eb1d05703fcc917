//! Task management functions: which tasks each one names (SAM-5, clause 7). Ending them is the caller's, who has them.

use crate::target::Lun;
use crate::task::Nexus;

/// A task as it is known outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskName {
    pub nexus: Nexus,
    pub lun: Lun,
    /// The command identifier, given by the initiator.
    pub tag: u64,
}

/// SAM-5, clause 7, without CLEAR ACA: there is no ACA condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskManagement {
    AbortTask(u64),
    AbortTaskSet,
    ClearTaskSet,
    LogicalUnitReset,
    NexusReset,
    QueryTask(u64),
    QueryTaskSet,
}

impl TaskManagement {
    /// Whether the function, sent by `from` to `lun`, is about `task`.
    pub fn names(self, from: Nexus, lun: Lun, task: &TaskName) -> bool {
        let (same_nexus, same_unit) = (task.nexus == from, task.lun == lun);
        match self {
            Self::AbortTask(tag) | Self::QueryTask(tag) => same_nexus && same_unit && task.tag == tag,
            Self::AbortTaskSet | Self::QueryTaskSet => same_nexus && same_unit,
            // All initiators share one task set (TST 000b in the control mode page).
            Self::ClearTaskSet | Self::LogicalUnitReset => same_unit,
            Self::NexusReset => same_nexus,
        }
    }

    /// Whether the tasks it names end, without an answer (TAS is 0); otherwise it only asks whether there are any.
    pub fn ends_tasks(self) -> bool {
        !matches!(self, Self::QueryTask(_) | Self::QueryTaskSet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_function_names_its_tasks() {
        let (us, them) = (Nexus(1), Nexus(2));
        let (here, there) = (Lun::ZERO, Lun::MAX);
        let tasks = [(us, here, 7), (us, here, 8), (us, there, 7), (them, here, 7), (them, there, 7)];
        let named = |function: TaskManagement| {
            tasks.map(|(nexus, lun, tag)| function.names(us, here, &TaskName { nexus, lun, tag }))
        };
        assert_eq!(named(TaskManagement::AbortTask(7)), [true, false, false, false, false]);
        assert_eq!(named(TaskManagement::QueryTask(8)), [false, true, false, false, false]);
        assert_eq!(named(TaskManagement::AbortTaskSet), [true, true, false, false, false]);
        assert_eq!(named(TaskManagement::QueryTaskSet), [true, true, false, false, false]);
        assert_eq!(named(TaskManagement::ClearTaskSet), [true, true, false, true, false]);
        assert_eq!(named(TaskManagement::LogicalUnitReset), [true, true, false, true, false]);
        assert_eq!(named(TaskManagement::NexusReset), [true, true, true, false, false]);
    }
}
