//! What a process uses.

use std::fs;
use std::time::Duration;

use rustix::process::Pid;

use super::{DriverError, Result};

/// A process by its id: a daemon's, whoever started it.
#[derive(Debug, Clone, Copy)]
pub struct Process(pub Pid);

impl Process {
    fn read(self, name: &str) -> Result<String> {
        let path = format!("/proc/{}/{name}", self.0);
        fs::read_to_string(&path).map_err(DriverError::io(format!("read {path}")))
    }

    /// Bytes of memory it has mapped and present, without guest memory. Pages it shares with other processes count in
    /// full, so that this is never less than its proportional set size.
    pub fn memory(self) -> Result<u64> {
        let text = self.read("smaps")?;
        let (mut total, mut in_guest) = (0, false);
        for line in text.lines() {
            let is_mapping =
                line.split_once(' ').is_some_and(|(range, _)| range.contains('-') && !range.ends_with(':'));
            if is_mapping {
                in_guest = line.contains("memfd:") || line.contains("hugepage");
            } else if let (Some(rest), false) = (line.strip_prefix("Rss:"), in_guest) {
                total += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) << 10;
            }
        }
        Ok(total)
    }

    /// The ids of its threads.
    pub fn threads(self) -> Result<Vec<Pid>> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.0)).map_err(DriverError::io("read /proc"))?;
        let ids = tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok());
        Ok(ids.filter_map(Pid::from_raw).collect())
    }

    /// The CPU time it has used in user and kernel mode, to 10 ms: that of threads that have ended and that of the
    /// kernel's workers for its io_uring, which are threads of it, included.
    pub fn cpu_time(self) -> Result<Duration> {
        let text = self.read("stat")?;
        let times = || {
            // The second field is a name with anything in it; utime and stime are the 14th and 15th.
            let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
            let user: u64 = fields.next()?.parse().ok()?;
            let system: u64 = fields.next()?.parse().ok()?;
            Some(user + system)
        };
        let ticks = times().ok_or_else(|| DriverError::Daemon(format!("/proc/{}/stat is odd", self.0)))?;
        Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_threads_memory_and_a_past() {
        let this = Process(rustix::process::getpid());
        // However little of the machine this thread gets, some ticks come.
        while this.cpu_time().unwrap() < Duration::from_millis(20) {}
        assert!(this.memory().unwrap() > 1 << 16);
        assert!(this.threads().unwrap().contains(&rustix::process::getpid()));
    }
}
