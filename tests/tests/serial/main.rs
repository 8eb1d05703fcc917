//! cleave-serial between a driver and clients of its ports.

mod backpressure;
mod consoles;
mod control;
mod hostile;
mod kill;
mod places;

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cleave_tests::driver::{ConsoleDriver, Daemon, PATIENCE};

/// A daemon, a driver that has taken its ports, and a directory for what the ports have on the host.
struct Serial {
    daemon: Daemon,
    driver: ConsoleDriver,
    directory: tempfile::TempDir,
}

impl Serial {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn connect(&self, name: &str) -> UnixStream {
        connect(&self.path(name))
    }
}

/// cleave-serial with `ports`, in which `@` stands for the directory.
fn start(ports: &[&str]) -> Serial {
    start_with(ports, &[])
}

fn start_with(ports: &[&str], more: &[&str]) -> Serial {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().display().to_string();
    let ports: Vec<String> =
        ports.iter().map(|port| format!("--port={}", port.replace('@', &place))).collect();
    let more: Vec<String> = more.iter().map(|word| word.replace('@', &place)).collect();
    let args: Vec<&str> = ports.iter().chain(&more).map(String::as_str).collect();
    let daemon = Daemon::start("cleave-serial", &args).unwrap();
    let mut driver = ConsoleDriver::connect(&daemon.socket).unwrap();
    driver.come_up(ports.len()).unwrap();
    assert_eq!(driver.strays, 0);
    Serial { daemon, driver, directory }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Connects as soon as somebody listens.
fn connect_patiently(path: &Path) -> UnixStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                return stream;
            }
            Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes that nobody could guess, and the same each time.
fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn read_exact(stream: &mut impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Reads until `words` have come; gives all that came.
fn read_until(stream: &mut impl Read, words: &str) -> String {
    let mut seen = Vec::new();
    let mut byte = [0];
    while !seen.ends_with(words.as_bytes()) {
        match stream.read(&mut byte) {
            Ok(0) => panic!("it ended after {:?}", String::from_utf8_lossy(&seen)),
            Ok(_) => seen.push(byte[0]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&seen)),
        }
    }
    String::from_utf8_lossy(&seen).into_owned()
}

fn run_ctl(serial: &Serial, words: &[&str]) -> std::process::Output {
    let mut command = std::process::Command::new(cleave_tests::driver::binary("cleave-serial").unwrap());
    command.arg("ctl").arg(serial.path("control")).args(words).output().unwrap()
}

/// What the control socket answers.
fn ctl(serial: &Serial, words: &[&str]) -> String {
    let output = run_ctl(serial, words);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Why it does not.
fn ctl_refused(serial: &Serial, words: &[&str]) -> String {
    let output = run_ctl(serial, words);
    assert!(!output.status.success(), "{words:?}");
    String::from_utf8(output.stderr).unwrap()
}
