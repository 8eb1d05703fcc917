//! Where the guest's serial port goes.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::rig::{BOOT, Rig, SOON, appears, says};
use cleave_tests::vm::Outcome;
use rustix::pty::OpenptFlags;

pub const CASES: &[crate::Case] = &[
    ("uarts::a_file_gets_what_the_guest_says", file),
    ("uarts::a_unix_socket_is_a_console", unix),
    ("uarts::ctrl_a_x_quits_and_the_terminal_is_restored", terminal),
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

fn terminal(rig: &Rig) -> Outcome<()> {
    let fail = |what: &'static str| move |error: rustix::io::Errno| format!("{what}: {error}");
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let ours = rustix::pty::openpt(flags).map_err(fail("openpt"))?;
    rustix::pty::unlockpt(&ours).map_err(fail("unlockpt"))?;
    let name = rustix::pty::ptsname(&ours, Vec::new()).map_err(fail("ptsname"))?;
    let theirs = File::options()
        .read(true)
        .write(true)
        .open(name.to_string_lossy().as_ref())
        .map_err(|error| format!("open the terminal: {error}"))?;
    // Asked on our side: the other hangs up with its session.
    let before = rustix::termios::tcgetattr(&ours).map_err(fail("tcgetattr"))?;
    let again = || theirs.try_clone().map_err(|error| error.to_string());

    // Keys are cleave's only where the terminal is its own: a session that it controls.
    let cleave = rig.shell().command();
    let mut child = std::process::Command::new("setsid")
        .arg("--ctty")
        .arg(cleave.get_program())
        .args(cleave.get_args())
        .stdin(again()?)
        .stdout(again()?)
        .stderr(again()?)
        .spawn()
        .map_err(|error| format!("start cleave: {error}"))?;
    let result = quit_by_keys(&ours, &mut child);
    let _ = child.kill();
    let _ = child.wait();
    result?;

    let after = rustix::termios::tcgetattr(&ours).map_err(fail("tcgetattr"))?;
    if before.local_modes == after.local_modes && before.input_modes == after.input_modes {
        return Ok(());
    }
    Err(format!("the terminal is not as it was: {:?}, then {:?}", before.local_modes, after.local_modes))
}

fn quit_by_keys(ours: &OwnedFd, child: &mut std::process::Child) -> Outcome<()> {
    let copy = ours.try_clone().map_err(|error| error.to_string())?;
    rustix::io::ioctl_fionbio(&copy, true).map_err(|error| error.to_string())?;
    let mut console = File::from(copy);
    read_until(&mut console, "SHELL", BOOT)?;
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
