//! Where the guest's serial port goes.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::rig::{BOOT, Rig, SOON, appears, says};
use cleave_tests::vm::Outcome;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use rustix::pty::OpenptFlags;
use rustix::termios::{InputModes, LocalModes, OptionalActions};

pub const CASES: &[crate::Case] = &[
    ("uarts::a_file_gets_what_the_guest_says", file),
    ("uarts::a_unix_socket_is_a_console", unix),
    ("uarts::a_pty_is_a_console", pty),
    ("uarts::a_guest_without_one_runs", off),
    ("uarts::ctrl_a_x_quits_and_the_terminal_is_restored", terminal),
    ("uarts::a_stopped_vmm_gives_the_terminal_back_and_takes_it_again", stopped),
];

fn file(rig: &Rig) -> Outcome<()> {
    let path = rig.path("console");
    let guest = rig.guest("echo from-the-guest")?;
    let exit = guest.with(["--uart", &format!("file={}", path.display())]).start()?.finish(BOOT)?;
    says(&fs::read_to_string(&path).map_err(|error| error.to_string())?, "from-the-guest")?;
    if exit.screen.is_empty() { Ok(()) } else { Err(format!("standard output got {:?}", exit.screen)) }
}

fn unix(rig: &Rig) -> Outcome<()> {
    let path = rig.path("console.sock");
    let vm = rig.shell().with(["--uart", &format!("unix={}", path.display())]).start()?;
    appears(&path)?;
    let mut console = UnixStream::connect(&path).map_err(|error| format!("connect: {error}"))?;
    console.set_read_timeout(Some(Duration::from_millis(200))).map_err(|error| error.to_string())?;
    read_until(&mut console, "SHELL", BOOT)?;
    console.write_all(b"echo socket-$((6 * 7)); poweroff -f\n").map_err(|error| error.to_string())?;
    read_until(&mut console, "socket-42", SOON)?;
    vm.finish(SOON).map(|_| ())
}

/// Reads until `words` came; the reader gives an error when it has nothing for a while.
fn read_until(from: &mut impl Read, words: &str, within: Duration) -> Outcome<()> {
    let deadline = Instant::now() + within;
    let (mut text, mut buffer) = (String::new(), [0; 1024]);
    while !text.contains(words) {
        if Instant::now() > deadline {
            return Err(format!("{words:?} did not come within {within:?}, but:\n{text}"));
        }
        match from.read(&mut buffer) {
            Ok(0) => return Err(format!("the console ended before {words:?}:\n{text}")),
            Ok(count) => text += &String::from_utf8_lossy(&buffer[..count]),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
    Ok(())
}

fn pty(rig: &Rig) -> Outcome<()> {
    let vm = rig.shell().with(["--uart", "pty"]).start()?;
    vm.expect_error("the uart is at ", SOON)?;
    let said = vm.expect_error("\n", SOON)?;
    let path = said.trim();
    let mut console = File::options()
        .read(true)
        .write(true)
        .custom_flags((OFlags::NOCTTY | OFlags::NONBLOCK).bits() as i32)
        .open(path)
        .map_err(|error| format!("open {path}: {error}"))?;
    read_until(&mut console, "SHELL", BOOT)?;
    console.write_all(b"echo pty-$((6 * 7)); poweroff -f\n").map_err(|error| error.to_string())?;
    read_until(&mut console, "pty-42", SOON)?;
    vm.finish(SOON).map(|_| ())
}

/// It has no console; what it did is on its disk.
fn off(rig: &Rig) -> Outcome<()> {
    let disk = rig.blank("disk", 1 << 20)?;
    let script = "[ -e /sys/class/tty/ttyS0 ] && cat /sys/class/tty/ttyS0/type >/tmp/type || echo none >/tmp/type
        printf %s \"without-$((6 * 7)) type $(cat /tmp/type)\" | dd of=/dev/vda conv=notrunc 2>/dev/null; sync";
    let guest = rig.guest(script)?.disk(&disk, "").with(["--uart", "off"]);
    let exit = guest.start()?.finish(BOOT)?;
    let mut found = [0; 32];
    File::open(&disk).and_then(|mut disk| disk.read_exact(&mut found)).map_err(|error| error.to_string())?;
    let found = String::from_utf8_lossy(&found).into_owned();
    // Type 0 is PORT_UNKNOWN: the driver has probed and found none.
    if !found.starts_with("without-42 type none") && !found.starts_with("without-42 type 0") {
        return Err(format!("the guest left {found:?} on its disk"));
    }
    if exit.screen.is_empty() { Ok(()) } else { Err(format!("standard output got {:?}", exit.screen)) }
}

/// cleave in a session that a terminal of ours controls: only there are keys its own. Our side of the terminal.
fn at_a_terminal(rig: &Rig, test: impl FnOnce(&OwnedFd, &mut Child) -> Outcome<()>) -> Outcome<()> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let ours = rustix::pty::openpt(flags).map_err(fail("openpt"))?;
    rustix::pty::unlockpt(&ours).map_err(fail("unlockpt"))?;
    let name = rustix::pty::ptsname(&ours, Vec::new()).map_err(fail("ptsname"))?;
    let theirs = File::options()
        .read(true)
        .write(true)
        .open(name.to_string_lossy().as_ref())
        .map_err(|error| format!("open the terminal: {error}"))?;
    let before = modes(&ours)?;
    let again = || theirs.try_clone().map_err(|error| error.to_string());
    let cleave = rig.shell().command();
    let mut child = Command::new("setsid")
        .arg("--ctty")
        .arg(cleave.get_program())
        .args(cleave.get_args())
        .stdin(again()?)
        .stdout(again()?)
        .stderr(again()?)
        .spawn()
        .map_err(|error| format!("start cleave: {error}"))?;
    let result = test(&ours, &mut child);
    let _ = child.kill();
    let _ = child.wait();
    result?;
    let after = modes(&ours)?;
    if before == after {
        Ok(())
    } else {
        Err(format!("the terminal is not as it was: {before:?}, then {after:?}"))
    }
}

fn fail(what: &'static str) -> impl Fn(Errno) -> String {
    move |error| format!("{what}: {error}")
}

/// Asked on our side: the other hangs up with its session.
fn modes(ours: &OwnedFd) -> Outcome<(LocalModes, InputModes)> {
    let modes = rustix::termios::tcgetattr(ours).map_err(fail("tcgetattr"))?;
    Ok((modes.local_modes, modes.input_modes))
}

fn terminal(rig: &Rig) -> Outcome<()> {
    at_a_terminal(rig, quit_by_keys)
}

/// Waits until a terminal echoes what is typed, or does not.
fn echoes(ours: &OwnedFd, wanted: bool) -> Outcome<()> {
    let deadline = Instant::now() + SOON;
    while modes(ours)?.0.contains(LocalModes::ECHO) != wanted {
        if Instant::now() > deadline {
            return Err(format!("the terminal does not come to echo={wanted}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn stopped(rig: &Rig) -> Outcome<()> {
    at_a_terminal(rig, |ours, child| {
        let pid = Pid::from_child(child);
        let signal = |signal| rustix::process::kill_process(pid, signal).map_err(fail("kill"));
        let copy = ours.try_clone().map_err(|error| error.to_string())?;
        rustix::io::ioctl_fionbio(&copy, true).map_err(|error| error.to_string())?;
        read_until(&mut File::from(copy), PROMPT, BOOT)?;
        echoes(ours, false)?;
        // As a shell's job: it gives the terminal back before it stops.
        signal(Signal::TSTP)?;
        echoes(ours, true)?;
        is_stopped(child)?;
        signal(Signal::CONT)?;
        echoes(ours, false)?;
        // Without a word: then the shell sets the terminal as it likes, which we do for it.
        let mut cooked = rustix::termios::tcgetattr(ours).map_err(fail("tcgetattr"))?;
        cooked.local_modes |= LocalModes::ECHO;
        signal(Signal::STOP)?;
        is_stopped(child)?;
        rustix::termios::tcsetattr(ours, OptionalActions::Now, &cooked).map_err(fail("tcsetattr"))?;
        signal(Signal::CONT)?;
        echoes(ours, false)?;
        let copy = ours.try_clone().map_err(|error| error.to_string())?;
        File::from(copy).write_all(b"\n").map_err(|error| error.to_string())?;
        type_and_quit(ours, child)
    })
}

/// A process gives its terminal back before it stops; whoever lets it go on in between does so in vain.
fn is_stopped(child: &Child) -> Outcome<()> {
    let deadline = Instant::now() + SOON;
    let stat = format!("/proc/{}/stat", child.id());
    while !fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") T ")) {
        if Instant::now() > deadline {
            return Err("the VMM does not stop".to_owned());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn quit_by_keys(ours: &OwnedFd, child: &mut Child) -> Outcome<()> {
    let copy = ours.try_clone().map_err(|error| error.to_string())?;
    rustix::io::ioctl_fionbio(&copy, true).map_err(|error| error.to_string())?;
    let mut console = File::from(copy);
    read_until(&mut console, PROMPT, BOOT)?;
    type_and_quit(ours, child)
}

/// Of the guest's shell. Before it is shown, Ctrl-C ends the shell, which is the guest's init.
const PROMPT: &str = "/ # ";

fn type_and_quit(ours: &OwnedFd, child: &mut Child) -> Outcome<()> {
    let mut console = File::from(ours.try_clone().map_err(|error| error.to_string())?);
    // Ctrl-C is the guest's.
    console.write_all(b"\x03echo still-$((5 * 5))\n").map_err(|error| error.to_string())?;
    read_until(&mut console, "still-25", SOON)?;
    console.write_all(b"\x01x").map_err(|error| error.to_string())?;
    let deadline = Instant::now() + SOON;
    loop {
        match child.try_wait().map_err(|error| error.to_string())? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(format!("cleave ended with {status}")),
            None if Instant::now() > deadline => return Err("Ctrl-A x did not end cleave".to_owned()),
            None => std::thread::sleep(Duration::from_millis(20)),
        }
        // A terminal that shows nothing more would keep cleave waiting for its last words.
        let _ = console.read(&mut [0; 1024]);
    }
}
