use std::io::{Read, Write};
use std::path::Path;
use std::thread;

use super::*;
use crate::config::Restart;

fn spec(program: &str, device: &str, args: Vec<std::ffi::OsString>) -> DaemonSpec {
    let (program, device) = (program.into(), device.into());
    DaemonSpec {
        program,
        device,
        args,
        restart: Restart::Never,
        restart_limit: None,
        io_timeout: None,
        terminal: Terminal::None,
        keeps_state: false,
        needs: None,
    }
}

/// A shell that plays the daemon: descriptor 3 is its socket, `$0` is the option that says so.
fn shell(script: &str) -> (Daemon, UnixStream) {
    let args = vec!["-c".into(), script.into()];
    spawn(&spec("sh", "disk0", args), None).unwrap()
}

fn said(mut socket: UnixStream) -> String {
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    text
}

fn ended(daemon: &mut Daemon) -> DaemonExit {
    assert!(daemon.wait_until(Instant::now() + Duration::from_secs(5)), "it still runs");
    daemon.exit().unwrap()
}

#[derive(Debug, thiserror::Error)]
#[error("the daemon closed the connection")]
struct Closed;

#[test]
fn a_daemon_gets_its_socket() {
    let (mut daemon, socket) = shell("echo $0 >&3");
    assert_eq!(said(socket), "--fd=3\n");
    assert!(ended(&mut daemon).success());
}

#[test]
fn a_daemon_is_in_a_process_group_of_its_own() {
    let (daemon, _socket) = shell("read x <&3");
    let pid = Pid::from_child(&daemon.child);
    assert_eq!(rustix::process::getpgid(Some(pid)), Ok(pid));
}

#[test]
fn how_it_ended_is_said_in_words() {
    let (mut daemon, _socket) = shell("exit 5");
    assert_eq!(ended(&mut daemon).to_string(), "sh (disk0) ended with exit code 5");
    let (mut daemon, mut socket) = shell("read x <&3; kill -9 $$");
    assert_eq!(daemon.exit(), None);
    socket.write_all(b"\n").unwrap();
    assert_eq!(ended(&mut daemon).to_string(), "sh (disk0) was killed by signal 9");
    assert_eq!(daemon.kill(Instant::now()), daemon.exit());
}

#[test]
fn an_early_end_gives_the_machine_its_exit_code() {
    for (script, code) in [
        ("exit 2", ExitCode::Usage),
        ("exit 3", ExitCode::Host),
        ("exit 1", ExitCode::Device),
        ("exit 0", ExitCode::Device),
        ("kill -11 $$", ExitCode::Device),
    ] {
        let (daemon, _socket) = shell(script);
        let failure = daemon.failure(Closed);
        assert_eq!(failure.code, code, "{script}");
        assert!(failure.to_string().starts_with("sh (disk0) "), "{failure}");
    }
    let (daemon, _socket) = shell("read x <&3");
    let failure = daemon.failure(Closed);
    assert_eq!((failure.code, failure.to_string()), (ExitCode::Device, Closed.to_string()));
}

#[test]
fn a_dropped_daemon_is_gone() {
    let (daemon, _socket) = shell("trap '' TERM; while :; do sleep 1; done");
    let process = format!("/proc/{}", daemon.child.id());
    assert!(Path::new(&process).exists());
    drop(daemon);
    assert!(!Path::new(&process).exists());
}

#[test]
fn a_daemon_ends_with_its_socket() {
    let (mut daemon, socket) = shell("cat <&3 >/dev/null");
    drop(socket);
    assert!(ended(&mut daemon).success());
}

#[test]
fn a_daemon_dies_with_the_thread_that_started_it() {
    let (mut daemon, _socket) = thread::spawn(|| shell("while :; do sleep 1; done")).join().unwrap();
    assert_eq!(ended(&mut daemon).to_string(), "sh (disk0) was killed by signal 9");
}

#[test]
fn stopping_is_polite_first() {
    let (polite, mut polite_socket) = shell("trap 'exit 0' TERM; echo >&3; while :; do read x <&3; done");
    let (stubborn, mut stubborn_socket) = shell("trap '' TERM; echo >&3; while :; do read x <&3; done");
    for socket in [&mut polite_socket, &mut stubborn_socket] {
        socket.read_exact(&mut [0]).unwrap();
    }
    let exits = stop_all(vec![polite, stubborn], Duration::from_millis(200));
    assert!(exits[0].success());
    assert_eq!(exits[1].status.signal(), Some(9));
}

#[test]
fn a_program_that_is_nowhere_is_named() {
    let spec = spec("cleave-nothing", "x", Vec::new());
    let error = spawn(&spec, None).unwrap_err().to_string();
    assert!(error.starts_with("cleave-nothing is neither beside cleave in /"), "{error}");
}

#[test]
fn a_daemon_that_hangs_is_forced_to_end() {
    let (mut daemon, _socket) = shell("kill -STOP $$");
    daemon.force();
    assert_eq!(ended(&mut daemon).status.signal(), Some(9));
}

#[test]
fn what_one_keeps_its_successor_finds() {
    let keeping = |script: &str| DaemonSpec {
        keeps_state: true,
        ..spec("sh", "balloon0", vec!["-c".into(), script.into()])
    };
    let first = keeping("echo kept >&4");
    let state = state_file(&first).unwrap();
    let (mut daemon, _socket) = spawn(&first, state.as_ref()).unwrap();
    assert!(ended(&mut daemon).success());
    let second = keeping("read word </proc/self/fd/4; echo $word $1 >&3");
    let (_daemon, socket) = spawn(&second, state.as_ref()).unwrap();
    assert_eq!(said(socket), "kept --state-fd=4\n");
    assert!(state_file(&spec("sh", "disk0", Vec::new())).unwrap().is_none());
}

#[test]
fn a_program_that_cannot_do_what_it_is_for_is_refused_with_its_version() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("old");
    let script = "#!/bin/sh\ncase $1 in --help) echo '  --fd N'; echo '  --vhost-users' >&2; exit 1 ;;\n\
                  --version) echo 'old 2023_03_09'; echo more ;; esac\n";
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let needs = |option| {
        let needs = Some(crate::plan::Need { option, advice: "install a newer one" });
        DaemonSpec { needs, ..spec(program.to_str().unwrap(), "net0", Vec::new()) }
    };
    assert!(check(&needs("--fd")).is_ok());
    let said = check(&needs("--vhost-user")).unwrap_err().to_string();
    let expected =
        "net0: this passt does not know --vhost-user".replace("this passt", &program.display().to_string());
    assert_eq!(said, format!("{expected} (it is 'old 2023_03_09'): install a newer one"));
    let missing = DaemonSpec { program: "cleave-nothing".into(), ..needs("--fd") };
    assert!(matches!(check(&missing), Err(DaemonError::NotFound { .. })));
}
