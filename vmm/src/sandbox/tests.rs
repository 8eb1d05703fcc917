#![expect(unsafe_code, reason = "a thread leaves what it shares")]

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::process::{Command, Output};

use super::*;

/// What a copy of this program, started by a test, is to do in one of its threads.
const DEED: &str = "CLEAVE_TEST_DEED";

/// As [`confine_process`] does it, but for the main thread: that one runs all tests.
pub(super) fn confine_threads() {
    CONFINEMENT.get_or_init(|| {
        report_violations("cleave", || {}).unwrap();
        Confinement::new(|| {}).unwrap()
    });
}

/// Runs one of [`deeds`] in a process of its own.
fn see(deed: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sandbox::tests::deeds", "--nocapture"])
        .env(DEED, deed)
        .output()
        .unwrap()
}

/// Not a test by itself: what the processes that [`see`] starts do.
#[test]
fn deeds() {
    let Ok(deed) = std::env::var(DEED) else { return };
    let (kind, deed) = deed.split_once(' ').unwrap();
    let before_end = || {
        let _ = rustix::io::write(rustix::stdio::stderr(), b"before the end\n");
    };
    confine_process(before_end, kind == "namespaces").unwrap();
    match kind {
        "main" | "namespaces" => {}
        "vCPU" => confine_thread(Thread::Vcpu),
        "session" => confine_thread(Thread::Session),
        "control" => confine_thread(Thread::Control),
        other => panic!("no thread is a {other}"),
    }
    let result: io::Result<()> = match deed {
        "opens a file" => File::open("/etc/passwd").map(drop),
        "listens on TCP" => TcpListener::bind("127.0.0.1:0").map(drop),
        "connects a unix socket" => UnixStream::connect("/nonexistent/socket").map(drop),
        "starts a program" => Command::new("/bin/true").output().map(drop),
        "names the host" => rustix::system::sethostname(b"host").map_err(Into::into),
        "looks at its terminal" => match rustix::termios::tcgetpgrp(rustix::stdio::stdin()) {
            Ok(_) | Err(rustix::io::Errno::NOTTY) => Ok(()),
            Err(errno) => Err(errno.into()),
        },
        "leaves its file system" => {
            // SAFETY: this thread shares nothing any more that it did not share by intention.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }.map_err(Into::into)
        }
        "unblocks a pipe" => rustix::io::ioctl_fionbio(rustix::stdio::stdin(), false).map_err(Into::into),
        other => panic!("nobody {other}"),
    };
    eprintln!("done: {:?}", result.map_err(|error| error.kind()));
    // What the test runner does next is nothing for this filter.
    std::process::exit(0);
}

#[test]
fn a_violation_is_told_in_one_line_and_ends_the_process() {
    for (deed, call) in [
        ("vCPU opens a file", "openat (257)"),
        ("vCPU connects a unix socket", "socket (41)"),
        ("vCPU unblocks a pipe", "ioctl (16)"),
        ("session opens a file", "openat (257)"),
        ("session listens on TCP", "socket (41)"),
        ("control opens a file", "openat (257)"),
        ("control connects a unix socket", "socket (41)"),
        ("main names the host", "sethostname (170)"),
        ("main leaves its file system", "unshare (272)"),
    ] {
        let Output { status, stderr, .. } = see(deed);
        let stderr = String::from_utf8_lossy(&stderr);
        assert_eq!(status.code(), Some(1), "{deed}: {status}: {stderr}");
        let kind = deed.split(' ').next().unwrap();
        let line = format!(
            "cleave: the sandbox stopped a thread of kind '{kind}': system call {call} is not allowed"
        );
        let lines: Vec<_> = stderr.lines().collect();
        assert!(matches!(lines[..], ["before the end", said] if said.starts_with(&line)), "{deed}: {stderr}");
    }
    for deed in ["vCPU starts a program", "session starts a program"] {
        assert_eq!(see(deed).status.code(), Some(1), "{deed}");
    }
}

#[test]
fn what_a_thread_is_for_it_may_do() {
    for (deed, result) in [
        ("namespaces leaves its file system", "Ok(())"),
        ("main opens a file", "Ok(())"),
        ("main starts a program", "Ok(())"),
        ("main listens on TCP", "Ok(())"),
        ("vCPU looks at its terminal", "Ok(())"),
        ("session connects a unix socket", "Err(NotFound)"),
        ("session unblocks a pipe", "Ok(())"),
    ] {
        let Output { status, stderr, .. } = see(deed);
        let stderr = String::from_utf8_lossy(&stderr);
        assert!(
            status.success() && stderr.contains(&format!("done: {result}")),
            "{deed}: {status}: {stderr}"
        );
    }
}
