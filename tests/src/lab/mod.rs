//! A machine with a real KVM, on any machine.
//!
//! QEMU emulates an AMD processor with SVM and nested paging; a Debian kernel booted on it (called L1) has a
//! complete `/dev/kvm`, and a VMM started there boots stock guests. L1's root is this machine's own, read-only,
//! under a layer in memory: every file and program is there at its own path, and what is written is gone
//! afterwards, except in the share (`$LAB`). L1 is up in about 4 s.
//!
//! Where this machine's own KVM runs stock guests, the same job runs here directly.
//!
//! ```text
//! Job ──run──> L1 boots ──> job runs ──> exit code on the share ──> Outcome
//!                 │             └── time limit: the machine is stopped, Error::TimeLimit
//!                 └── ends early: Error::MachineDied, with the end of its console
//! ```
//!
//! A job sees: `$LAB` the share, `$LAB_DISK0`, `$LAB_DISK1`... the paths of its disks, and QEMU,
//! qemu-storage-daemon and fio first in `$PATH`.

mod directory;
mod follower;
mod initrd;
mod machine;
mod place;
mod terminal;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use cleave_common::size::ByteSize;

use crate::cache::Cache;
use crate::error::{Context, Error, Result, last_lines};
use crate::kernel::Kernel;
use crate::tools::Tools;

pub use directory::RunDirectory;
use follower::Follower;
pub use place::{Place, binaries};
use terminal::Terminal;

const POLL: Duration = Duration::from_millis(50);

/// One command and the machine it wants.
#[derive(Debug, Clone)]
pub struct Job {
    pub command: Vec<OsString>,
    pub environment: Vec<(String, OsString)>,
    /// Where the command starts; the share when not said.
    pub directory: Option<PathBuf>,
    pub time_limit: Duration,
    /// How long an emulated machine may give no sign of life, of which it gives one every 5 s. Nested virtualization freezes
    /// one now and then.
    pub silence_limit: Duration,
    /// CPUs of an emulated machine. With more than one, QEMU emulates each on a thread of its own, and then guests with
    /// several vCPUs hang or triple-fault now and then, under QEMU's own VMM as under ours; with one they do not.
    pub cpus: u32,
    pub memory: ByteSize,
    /// 2 MiB pages that L1 sets aside when it boots.
    pub huge_pages: u32,
    /// NUMA nodes that an emulated machine's memory is on, an equal part on each; its CPUs are on the first.
    pub numa_nodes: u32,
    /// One nanosecond of the machine's time is one instruction: CPU times repeat within a percent. One CPU.
    pub instruction_clock: bool,
    pub disks: Vec<Disk>,
    /// Output goes to this process's own as it comes, besides being kept.
    pub follow: bool,
}

/// A file of this machine that the job sees as a disk.
#[derive(Debug, Clone)]
pub struct Disk {
    pub path: PathBuf,
    /// What the job writes ends up in the file; else it is gone with the job.
    pub persistent: bool,
}

/// What came of a job.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    /// Holds the share and the console; removed when dropped unless kept.
    pub directory: RunDirectory,
}

impl Job {
    pub fn new<S: AsRef<OsStr>>(command: impl IntoIterator<Item = S>) -> Self {
        Self {
            command: command.into_iter().map(|word| word.as_ref().to_owned()).collect(),
            environment: Vec::new(),
            directory: None,
            time_limit: Duration::from_secs(300),
            silence_limit: Duration::from_secs(120),
            cpus: 1,
            memory: ByteSize(3 << 30),
            huge_pages: 0,
            numa_nodes: 1,
            instruction_clock: false,
            disks: Vec::new(),
            follow: false,
        }
    }

    /// A job that is a shell script.
    pub fn script(text: &str) -> Self {
        Self::new(["/bin/sh", "-euc", text])
    }
}

/// The lab of this machine.
#[derive(Debug)]
pub struct Lab {
    cache: Cache,
    tools: Tools,
    place: Place,
    why: String,
}

impl Lab {
    /// Decides where jobs run, and makes what they need; slow once.
    pub fn open(cache: &Cache) -> Result<Self> {
        let (place, why) = place::choose();
        Ok(Self { cache: cache.clone(), tools: Tools::open(cache)?, place, why })
    }

    pub fn place(&self) -> Place {
        self.place
    }

    /// Why jobs run where they run, for a person.
    pub fn why(&self) -> &str {
        &self.why
    }

    /// An empty directory for a job; files put into its share are the job's `$LAB`.
    pub fn directory(&self) -> Result<RunDirectory> {
        RunDirectory::create(&self.cache)
    }

    /// Runs a job to its end. An exit code other than 0 is an outcome; errors are for jobs that did not end.
    pub fn run(&self, job: &Job, directory: RunDirectory) -> Result<Outcome> {
        let mut child = self.start(job, &directory, false)?;
        let mut follower = Follower::new(&directory.share(), job.follow);
        let ended = self.wait(job, &directory, &mut child, || follower.copy());
        follower.finish();
        let (code, directory) = self.code(ended, directory)?;
        Ok(Outcome {
            code,
            stdout: read_lossy(&directory.share().join("stdout")),
            stderr: read_lossy(&directory.share().join("stderr")),
            directory,
        })
    }

    /// Runs a job on this process's terminal and gives its exit code. There is no time limit; each byte goes
    /// to the job, Ctrl-A and Ctrl-C too.
    pub fn interact(&self, job: &Job, directory: RunDirectory) -> Result<i32> {
        let terminal = Terminal::prepare(self.place)?;
        let result = self.start(job, &directory, true).and_then(|mut child| {
            let status = child.wait().context(|| "wait for the job")?;
            self.code(Ok(status), directory)
        });
        terminal.restore()?;
        result.map(|(code, _)| code)
    }

    fn start(&self, job: &Job, directory: &RunDirectory, interactive: bool) -> Result<Child> {
        let disks = match self.place {
            Place::Host => machine::copies_of(&job.disks, directory)?,
            Place::L1 => (0..job.disks.len()).map(machine::device_name).collect(),
        };
        self.write_script(job, directory, &disks)?;
        match self.place {
            Place::Host => machine::on_host(directory, interactive),
            Place::L1 => {
                let kernel = Kernel::of_the_lab(&self.cache)?;
                let initrd = initrd::make(&self.cache, &self.tools, &kernel)?;
                machine::in_l1(&self.tools, &kernel, &initrd, job, directory, interactive)
            }
        }
    }

    /// Waits for the machine to end, calling `meanwhile` often.
    fn wait(
        &self,
        job: &Job,
        directory: &RunDirectory,
        child: &mut Child,
        mut meanwhile: impl FnMut(),
    ) -> Result<ExitStatus> {
        let deadline = Instant::now() + job.time_limit;
        loop {
            if let Some(status) = child.try_wait().context(|| "wait for the job")? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                machine::stop(child);
                return Err(Error::TimeLimit {
                    seconds: job.time_limit.as_secs(),
                    console: directory.console(),
                });
            }
            // Where instructions are the clock, its seconds are not ours.
            if !job.instruction_clock
                && directory.silence().is_some_and(|silence| silence > job.silence_limit)
            {
                machine::stop(child);
                return Err(Error::Frozen {
                    seconds: job.silence_limit.as_secs(),
                    console: directory.console(),
                });
            }
            meanwhile();
            std::thread::sleep(POLL);
        }
    }

    /// The job's exit code; without one, what became of the machine.
    fn code(&self, ended: Result<ExitStatus>, mut directory: RunDirectory) -> Result<(i32, RunDirectory)> {
        let status = ended.inspect_err(|_| directory.keep())?;
        let code = fs::read_to_string(directory.share().join("code"))
            .ok()
            .and_then(|text| text.trim().parse::<i32>().ok());
        if let Some(code) = code {
            if code != 0 {
                directory.keep();
            }
            return Ok((code, directory));
        }
        directory.keep();
        Err(Error::MachineDied {
            status: status.to_string(),
            tail: last_lines(&(read_lossy(&directory.console()) + &read_lossy(&directory.machine_log())), 20),
            console: directory.console(),
        })
    }

    /// The share's `job`: environment, directory, command.
    fn write_script(&self, job: &Job, directory: &RunDirectory, disks: &[PathBuf]) -> Result<()> {
        let share = match self.place {
            Place::Host => directory.share(),
            Place::L1 => PathBuf::from("/lab"),
        };
        let mut script = String::from("#!/bin/sh\n");
        let mut export = |name: &str, value: &OsStr| {
            script += &format!("export {name}={}\n", quoted(value));
        };
        export("LAB", share.as_os_str());
        for (index, disk) in disks.iter().enumerate() {
            export(&format!("LAB_DISK{index}"), disk.as_os_str());
        }
        for (name, value) in &job.environment {
            export(name, value);
        }
        let start = job.directory.as_ref().unwrap_or(&share);
        script += &format!("PATH={}:$PATH\n", quoted(self.tools.bin().as_os_str()));
        script += &format!("cd {} || exit 126\n", quoted(start.as_os_str()));
        script +=
            &format!("exec {}\n", job.command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "));
        let path = directory.share().join("job");
        fs::write(&path, script).context(|| format!("write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
            .context(|| format!("make {} executable", path.display()))
    }
}

/// A word that the shell reads as itself.
fn quoted(word: &OsStr) -> String {
    format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"))
}

fn read_lossy(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        assert_eq!(quoted(OsStr::new("it's $HOME")), r"'it'\''s $HOME'");
    }
}
