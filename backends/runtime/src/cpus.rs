//! The CPUs that queue threads run on.

use std::io;

use cleave_common::cpus::CpuList;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Why threads cannot run there.
#[derive(Debug, thiserror::Error)]
pub enum CpusError {
    #[error("--cpus: this process may not run on CPU {cpu}, but on {allowed}")]
    NotAllowed { cpu: usize, allowed: CpuList },
    #[error("--cpus: a thread cannot be kept on CPU {cpu}")]
    Pin { cpu: usize, source: io::Error },
}

/// Whether this process may run on all of them.
pub fn check(cpus: &CpuList) -> Result<(), CpusError> {
    // More CPUs than the set can name: what is allowed shows when a thread is pinned.
    let Ok(set) = sched_getaffinity(None) else { return Ok(()) };
    match cpus.cpus().iter().find(|cpu| !set.is_set(**cpu)) {
        Some(cpu) => Err(CpusError::NotAllowed { cpu: *cpu, allowed: list(&set) }),
        None => Ok(()),
    }
}

/// Keeps this thread, which serves queue `index`, on its CPU.
pub fn pin(cpus: &CpuList, index: u16) -> Result<(), CpusError> {
    let cpu = cpus.round_robin(index.into());
    let mut one = CpuSet::new();
    one.set(cpu);
    sched_setaffinity(None, &one).map_err(|errno| CpusError::Pin { cpu, source: errno.into() })
}

/// A process runs somewhere, so that there is one in it.
fn list(set: &CpuSet) -> CpuList {
    (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_pinned_round_and_round() {
        let cpus = list(&sched_getaffinity(None).unwrap());
        check(&cpus).unwrap();
        let thread = std::thread::spawn(move || {
            for index in 0..2 * cpus.cpus().len() as u16 {
                pin(&cpus, index).unwrap();
                assert_eq!(list(&sched_getaffinity(None).unwrap()).cpus(), [cpus.round_robin(index.into())]);
            }
        });
        thread.join().unwrap();
    }

    #[test]
    fn what_is_not_allowed_is_named_with_what_is() {
        let allowed = list(&sched_getaffinity(None).unwrap());
        let said = check(&"1023".parse().unwrap()).unwrap_err().to_string();
        assert!(said.contains("CPU 1023") && said.ends_with(&allowed.to_string()), "{said}");
    }
}
