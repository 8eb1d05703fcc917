//! A daemon under test: the real program, started, watched and ended.

use std::ffi::OsString;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{DriverError, PATIENCE, Process, Result};
use crate::cache::target_directory;
use crate::interruption;

/// The program `name`, from `$CLEAVE_BIN_DIR` or from where this test was built.
///
/// # Errors
/// It is not there: a message that says how to build it.
pub fn binary(name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe().unwrap_or_default();
    let beside = here.ancestors().skip(1).take(2).map(Path::to_owned);
    let given = std::env::var_os("CLEAVE_BIN_DIR").map(PathBuf::from);
    let places: Vec<PathBuf> = given.map_or_else(|| beside.collect(), |given| vec![given]);
    let found = places.iter().map(|place| place.join(name)).find(|path| path.exists());
    found.ok_or_else(|| {
        let places: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
        DriverError::Daemon(format!(
            "{name} is not in {}: build it first ('cargo build -p {name}'), or set CLEAVE_BIN_DIR",
            places.join(" or ")
        ))
    })
}

fn launch(command: &mut Command, log: &Path) -> Result<Child> {
    let log = fs::OpenOptions::new().create(true).append(true).open(log);
    let program = command.get_program().display().to_string();
    command
        .env("CLEAVE_LOG", "debug")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.map_err(DriverError::io("create a log"))?)
        .spawn()
        .map_err(DriverError::io(format!("start {program}")))
}

/// A running daemon. Dropping it kills it.
pub struct Daemon {
    child: Child,
    program: OsString,
    args: Vec<OsString>,
    pub socket: PathBuf,
    _directory: tempfile::TempDir,
    log: PathBuf,
}

impl Daemon {
    /// Starts `program` with `args` and a `--socket-path` of its own, and waits until it listens.
    pub fn start(program: &str, args: &[&str]) -> Result<Self> {
        let directory = socket_directory()?;
        let socket = directory.path().join("socket");
        let mut command = Command::new(binary(program)?);
        command.arg("--socket-path").arg(&socket).args(args);
        Self::spawn(command, socket, directory)
    }

    /// Starts another program that will listen on the path that `arguments` is given.
    pub fn start_other(program: &Path, arguments: impl FnOnce(&Path) -> Vec<String>) -> Result<Self> {
        let directory = socket_directory()?;
        let socket = directory.path().join("socket");
        let mut command = Command::new(program);
        command.args(arguments(&socket));
        Self::spawn(command, socket, directory)
    }

    fn spawn(mut command: Command, socket: PathBuf, directory: tempfile::TempDir) -> Result<Self> {
        let log = directory.path().join("log");
        let program = command.get_program().to_owned();
        let args = command.get_args().map(Into::into).collect();
        let child = launch(&mut command, &log)?;
        let mut daemon = Self { child, program, args, socket, _directory: directory, log };
        daemon.wait_for_socket()?;
        Ok(daemon)
    }

    /// A connection that is dropped at once would be a session of its own: look at the socket, do not touch it.
    fn wait_for_socket(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !listens(&self.socket) {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(DriverError::Daemon(format!("the daemon ended ({status}): {}", self.log())));
            }
            if Instant::now() > deadline {
                return Err(DriverError::Daemon(format!("the daemon does not listen: {}", self.log())));
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Ends it as nothing else does (SIGKILL), and has a successor listen on the same socket.
    pub fn kill_and_restart(&mut self) -> Result<()> {
        if self.is_running() {
            self.signal(Signal::KILL)?;
            self.wait()?;
        }
        self.child = launch(Command::new(&self.program).args(&self.args), &self.log)?;
        self.wait_for_socket()
    }

    pub fn connect(&self) -> Result<UnixStream> {
        UnixStream::connect(&self.socket).map_err(DriverError::io("connect to the daemon"))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has said on standard error.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has said `text`.
    pub fn wait_for_log(&self, text: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            if Instant::now() > deadline {
                return Err(DriverError::Daemon(format!(
                    "the daemon never said '{text}' but: {}",
                    self.log()
                )));
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.process().0, signal)
            .map_err(|errno| DriverError::io("signal the daemon")(errno.into()))
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Ok(status),
                Ok(None) if Instant::now() > deadline => {
                    return Err(DriverError::Daemon(format!("the daemon does not end: {}", self.log())));
                }
                Ok(None) => thread::sleep(Duration::from_millis(2)),
                Err(error) => return Err(DriverError::io("wait for the daemon")(error)),
            }
        }
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub fn process(&self) -> Process {
        // A child's id fits, and is not 0.
        Process(Pid::from_raw(self.child.id() as i32).unwrap_or(Pid::INIT))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("the daemon said:\n{}", self.log());
        }
    }
}

/// In the network of this thread, which may be one of its own.
fn listens(socket: &Path) -> bool {
    let table = fs::read_to_string("/proc/thread-self/net/unix").unwrap_or_default();
    // Flags 00010000: the socket accepts connections.
    table.lines().any(|line| line.ends_with(&format!(" {}", socket.display())) && line.contains(" 00010000 "))
}

/// Short, for a socket's path has 107 bytes at most.
fn socket_directory() -> Result<tempfile::TempDir> {
    let place = target_directory().join("tmp");
    fs::create_dir_all(&place).map_err(DriverError::io(format!("create {}", place.display())))?;
    let directory = tempfile::Builder::new().prefix("d").tempdir();
    let directory = directory.map_err(DriverError::io("create a directory"))?;
    interruption::removes(directory.path());
    Ok(directory)
}
