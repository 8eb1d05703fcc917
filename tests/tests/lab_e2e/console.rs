//! A Debian guest's console and serial ports, cleave-serial behind them: people at hvc0, QEMU's guest agent, a stream through
//! the daemon's deaths.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::rig::{Rig, SOON, appears, nothing_left_behind, processes};
use cleave_tests::vm::{Outcome, Vm};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::{Value, json};

pub const CASES: &[crate::Case] = &[
    ("console::hvc0_has_a_login_that_several_attach_to_and_the_size_of_their_terminal", people),
    ("console::the_guest_agent_answers_and_100_mb_arrive_while_the_daemon_is_killed", programs),
];

/// systemd's boot takes about 25 s in an emulated host that has a CPU of the machine for itself.
const BOOT: Duration = Duration::from_secs(300);
/// A transfer in an emulated host.
const TRANSFER: Duration = Duration::from_secs(300);
const KILLS: usize = 8;
const SIZE: usize = 100_000_000;

fn start(rig: &Rig, words: &[String]) -> Outcome<Vm> {
    let disk = std::env::var_os("LAB_DISK0").map(PathBuf::from).ok_or("there is no disk in $LAB_DISK0")?;
    let mut command = rig.cleave(["run", "--kernel"]);
    command.arg(&rig.debian.kernel).arg("--initrd").arg(&rig.debian.initrd);
    command.args([
        "--append",
        "console=ttyS0 console=hvc0 root=/dev/vda quiet systemd.wants=serial-getty@hvc0.service",
    ]);
    command.args(["--cpus", "2", "--memory", "512M", "--disk", &disk.display().to_string()]);
    command.args(words);
    Vm::start(&mut command)
}

/// What a person has before him: a pseudo-terminal with `cleave console` on it.
struct Person {
    screen: fs::File,
    client: Child,
    seen: String,
}

impl Person {
    fn attach(rig: &Rig, socket: &Path, columns: u16, rows: u16) -> Outcome<Self> {
        let failed = |error: rustix::io::Errno| format!("a pseudo-terminal: {error}");
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).map_err(failed)?;
        grantpt(&master).and_then(|()| unlockpt(&master)).map_err(failed)?;
        let path = ptsname(&master, Vec::new()).map_err(failed)?.to_string_lossy().into_owned();
        let slave = fs::File::options().read(true).write(true).open(path).map_err(|e| e.to_string())?;
        let again = || slave.try_clone().map_err(|error| error.to_string());
        // A session of its own has the terminal: so it is in its foreground, and hears of its size.
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait"]).arg(rig.daemon("cleave")).arg("console").arg(socket);
        command.stdin(again()?).stdout(again()?).stderr(again()?);
        let person = Self {
            screen: master.into(),
            client: command.spawn().map_err(|e| e.to_string())?,
            seen: String::new(),
        };
        person.resize(columns, rows)?;
        Ok(person)
    }

    fn resize(&self, columns: u16, rows: u16) -> Outcome<()> {
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.screen, size).map_err(|error| format!("resize: {error}"))
    }

    fn type_line(&mut self, words: &str) -> Outcome<()> {
        self.screen.write_all(format!("{words}\r").as_bytes()).map_err(|error| error.to_string())
    }

    /// Reads until `words` appear.
    fn expect(&mut self, words: &str, patience: Duration) -> Outcome<()> {
        let deadline = Instant::now() + patience;
        let mut chunk = [0; 4096];
        loop {
            if let Some(at) = self.seen.find(words) {
                self.seen.drain(..at + words.len());
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = rustix::event::Timespec::try_from(left).ok();
            let mut fds = [rustix::event::PollFd::new(&self.screen, rustix::event::PollFlags::IN)];
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Ok(1) => {}
                _ => {
                    return Err(format!("{words:?} did not appear at the console; there is {:?}", self.seen));
                }
            }
            let count =
                self.screen.read(&mut chunk).map_err(|error| format!("{error} after {:?}", self.seen))?;
            self.seen.push_str(&String::from_utf8_lossy(&chunk[..count]));
        }
    }
}

impl Drop for Person {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

fn people(rig: &Rig) -> Outcome<()> {
    let socket = rig.path("tty");
    let vm = start(rig, &["--console".into(), format!("unix={},history=16K", socket.display())])?;
    appears(&socket)?;
    let mut first = Person::attach(rig, &socket, 132, 43)?;
    first.expect("Ctrl-] detaches", SOON)?;
    first.expect("hvc0", BOOT)?;
    first.expect("login: ", BOOT)?;
    first.type_line("root")?;
    first.expect("root@cleave-guest:~#", BOOT)?;
    first.type_line("echo SIZE-$(stty size | tr ' ' x).")?;
    first.expect("SIZE-43x132.", SOON)?;
    // The last one who shows a terminal has its size.
    let mut second = Person::attach(rig, &socket, 80, 25)?;
    second.expect("Ctrl-] detaches", SOON)?;
    second.expect("SIZE-43x132.", SOON)?;
    await_size(&mut second, 80, 25)?;
    first.expect("GOT-25x80.", SOON)?;
    first.resize(100, 30)?;
    await_size(&mut first, 100, 30)?;
    // The daemon is killed: whoever attaches again goes on at the same login.
    kill(&vm, None)?;
    first.expect("detached from", SOON)?;
    appears(&socket)?;
    let mut third = Person::attach(rig, &socket, 90, 31)?;
    third.expect("Ctrl-] detaches", SOON)?;
    await_size(&mut third, 90, 31)?;
    third.type_line("systemctl poweroff")?;
    vm.finish(BOOT)?;
    nothing_left_behind()
}

/// A size reaches the guest, and its shell, soon, and not at once.
fn await_size(person: &mut Person, columns: u16, rows: u16) -> Outcome<()> {
    person.type_line(&format!(
        "until [ \"$(stty size)\" = '{rows} {columns}' ]; do sleep 0.1; done; echo GOT-$(stty size | tr ' ' x)."
    ))?;
    person.expect(&format!("GOT-{rows}x{columns}."), SOON)
}

fn kill(vm: &Vm, last: Option<u32>) -> Outcome<u32> {
    let deadline = Instant::now() + SOON;
    loop {
        match processes("cleave-serial", Some(vm.pid()))[..] {
            [pid] if Some(pid) != last => {
                let status = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
                return status.map(|_| pid).map_err(|error| format!("kill: {error}"));
            }
            _ if Instant::now() > deadline => return Err("no cleave-serial came up".to_owned()),
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn connect(path: &Path) -> Outcome<UnixStream> {
    let deadline = Instant::now() + SOON;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(SOON)).map_err(|error| error.to_string())?;
                return Ok(stream);
            }
            Err(error) if Instant::now() > deadline => return Err(format!("{}: {error}", path.display())),
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Asks QEMU's guest agent, over a connection of its own.
fn ask(path: &Path, command: &str, arguments: Value) -> Outcome<Value> {
    let mut stream = connect(path)?;
    let request = match arguments {
        Value::Null => json!({ "execute": command }),
        arguments => json!({ "execute": command, "arguments": arguments }),
    };
    stream.write_all(format!("{request}\n").as_bytes()).map_err(|error| error.to_string())?;
    let mut line = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" {
        let count = stream.read(&mut byte).map_err(|error| format!("{command}: {error}"))?;
        if count == 0 {
            return Err(format!("{command}: it ended after {:?}", String::from_utf8_lossy(&line)));
        }
        line.push(byte[0]);
    }
    let answer: Value = serde_json::from_slice(&line).map_err(|error| format!("{command}: {error}"))?;
    match answer.get("return") {
        Some(value) => Ok(value.clone()),
        None => Err(format!("{command}: {answer}")),
    }
}

fn programs(rig: &Rig) -> Outcome<()> {
    let (agent, data) = (rig.path("agent"), rig.path("data"));
    // The machine's terminal is hvc0, whose daemon is the one that is killed.
    let words = [
        "--console".to_owned(),
        "stdio".to_owned(),
        "--serial".to_owned(),
        format!("name=org.qemu.guest_agent.0,unix={}", agent.display()),
        "--serial".to_owned(),
        format!("name=data,unix={}", data.display()),
    ];
    let mut vm = start(rig, &words)?;
    vm.expect("cleave-guest login:", BOOT)?;
    vm.send("root")?;
    vm.expect("root@cleave-guest:~#", BOOT)?;
    vm.send("systemctl start qemu-guest-agent; ls /dev/virtio-ports; echo AGENT-$(systemctl is-active qemu-guest-agent).")?;
    vm.expect("AGENT-active.", SOON)?;
    answers(&agent)?;
    let last = kill(&vm, None)?;
    answers(&agent)?;

    vm.send("seq 1 20000000 | head -c 100000000 >/dev/shm/data; sum=$(md5sum </dev/shm/data); echo S''UM-${sum%% *}.")?;
    vm.expect("SUM-", TRANSFER)?;
    let sum = vm.expect(".", SOON)?;
    vm.send("cat /dev/shm/data >/dev/virtio-ports/data; echo SENT-$?.")?;
    let count = AtomicUsize::new(0);
    let received = thread::scope(|scope| {
        let client = scope.spawn(|| receive_all(&data, &count));
        let mut last = Some(last);
        for kills in 1..=KILLS {
            while count.load(Ordering::Relaxed) < kills * SIZE / (KILLS + 1) && !client.is_finished() {
                thread::sleep(Duration::from_millis(1));
            }
            last = Some(kill(&vm, last)?);
        }
        client.join().map_err(|_| "the client failed".to_owned())?
    })?;
    vm.expect("SENT-0.", TRANSFER)?;
    let path = rig.write("received", &received)?;
    let output = Command::new("md5sum").arg(&path).output().map_err(|error| format!("md5sum: {error}"))?;
    let ours = String::from_utf8_lossy(&output.stdout).into_owned();
    let theirs = sum.trim_end_matches('.').rsplit('-').next().unwrap_or_default().to_owned();
    if received.len() != SIZE || !ours.starts_with(&theirs) || theirs.len() != 32 {
        return Err(format!("{} bytes arrived, with the sum {ours} instead of {theirs}", received.len()));
    }
    answers(&agent)?;
    vm.send("systemctl poweroff")?;
    vm.finish(BOOT)?;
    nothing_left_behind()
}

/// The agent answers to `guest-ping`, `guest-info` and `guest-exec`.
fn answers(agent: &Path) -> Outcome<()> {
    ask(agent, "guest-ping", Value::Null)?;
    let info = ask(agent, "guest-info", Value::Null)?;
    if info["version"].as_str().is_none() {
        return Err(format!("guest-info: {info}"));
    }
    let how = json!({"path": "/bin/uname", "arg": ["-n"], "capture-output": true});
    let pid = ask(agent, "guest-exec", how)?["pid"].clone();
    let deadline = Instant::now() + SOON;
    loop {
        let status = ask(agent, "guest-exec-status", json!({ "pid": pid }))?;
        if status["exited"] == json!(true) {
            // "cleave-guest\n" in base 64.
            return match status["out-data"].as_str() {
                Some("Y2xlYXZlLWd1ZXN0Cg==") => Ok(()),
                _ => Err(format!("guest-exec-status: {status}")),
            };
        }
        if Instant::now() > deadline {
            return Err("guest-exec does not end".to_owned());
        }
    }
}

/// Reads from whoever serves the port, one after the other, until everything has come.
fn receive_all(path: &Path, count: &AtomicUsize) -> Outcome<Vec<u8>> {
    let mut bytes = Vec::with_capacity(SIZE);
    let mut chunk = vec![0; 1 << 20];
    while bytes.len() < SIZE {
        let mut stream = connect(path)?;
        loop {
            match stream.read(&mut chunk) {
                // The daemon is dead: what it had sent has been read.
                Ok(0) => break,
                Ok(len) => bytes.extend_from_slice(&chunk[..len]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                Err(error) => return Err(format!("{error} after {} bytes", bytes.len())),
            }
            count.store(bytes.len(), Ordering::Relaxed);
            if bytes.len() >= SIZE {
                break;
            }
        }
    }
    Ok(bytes)
}
