//! cleave-block as an administrator or a service manager sees it: flags, sockets, signals, exit codes.

mod common;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use cleave_tests::driver::{BlockDriver, Buffer, Daemon, Frontend, IoStatus, RequestKind, binary};
use command_fds::{CommandFdExt, FdMapping};
use common::{MIB, disk, pattern, start};
use rustix::process::Signal;
use tempfile::NamedTempFile;

fn block() -> Command {
    let mut command = Command::new(binary("cleave-block").unwrap());
    command.stdin(Stdio::null());
    command
}

/// A process that a failed test does not leave behind.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The daemon with `socket` as its descriptor 3, and no other test's daemon with it.
fn inherit(socket: OwnedFd, image: &NamedTempFile) -> Killed {
    inherit_also(socket, vec![], image)
}

/// With more descriptors, which nobody told it of.
fn inherit_also(socket: OwnedFd, mut others: Vec<FdMapping>, image: &NamedTempFile) -> Killed {
    let mut command = block();
    command.args(["--fd", "3", "--blk-file"]).arg(image.path());
    others.push(FdMapping { parent_fd: socket, child_fd: 3 });
    command.fd_mappings(others).unwrap();
    Killed(command.spawn().unwrap())
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// It ends by itself, with this exit code, and says one line with these words.
fn fails(command: &mut Command, code: i32, words: &[&str]) {
    let output = command.output().unwrap();
    let text = said(&output);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
}

#[test]
fn capabilities_are_json() {
    let output = block().arg("--print-capabilities").output().unwrap();
    assert!(output.status.success());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json, serde_json::json!({ "type": "block", "features": ["read-only", "blk-file"] }));
}

#[test]
fn what_it_cannot_write_or_open_is_one_line_that_says_what_to_do() {
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let status = block().arg("--print-capabilities").stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    let output = status.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(said(&output).contains("cannot write to standard output: No space left"), "{}", said(&output));

    let odd = "/nowhere/a\nb";
    fails(block().args(["--socket-path", "/tmp/never", "--blk-file", odd]), 2, &["/nowhere/a\\nb: No such"]);
}

#[test]
fn a_wrong_command_line_is_a_usage_error() {
    let image = disk(MIB);
    let path = image.path().to_str().unwrap();
    for args in [
        &["--blk-file", path][..],
        &["--socket-path", "/nowhere/s"],
        &["--socket-path", "/nowhere/s", "--fd", "3", "--blk-file", path],
        &["--socket-path", "/nowhere/s", "--blk-file", path, "--num-queues", "0"],
        &["--socket-path", "/nowhere/s", "--blk-file", path, "--num-queues", "65"],
        &["--socket-path", "/nowhere/s", "--blk-file", path, "--queue-size", "100"],
        &["--socket-path", "/nowhere/s", "--blk-file", path, "--serial", "longer-than-twenty-bytes"],
        &["--socket-path", "/nowhere/s", "--blk-file", path, "--cache", "maybe"],
        &["--socket-path", "/nowhere/s", "--blk-file", path],
        &["--fd", "77", "--blk-file", path],
        &["--fd", "0", "--blk-file", path],
    ] {
        fails(block().args(args), 2, &["cleave-block: "]);
    }
    let with = |more: &[&str], words: &[&str]| {
        let common = ["--socket-path", "/nowhere/s", "--blk-file", path];
        fails(block().args(common).args(more), 2, words);
    };
    with(&["--blk_file", path], &["unexpected argument '--blk_file'", "'--blk-file'"]);
    with(&["--throttle", ""], &["nothing is limited", "iops-total=500"]);
    with(&["--throttle", "bps_total=5"], &["unknown key 'bps_total' (did you mean 'bps-total'?)"]);
}

#[test]
fn a_path_that_no_socket_can_have_is_one_line() {
    let image = disk(MIB);
    let directory = tempfile::tempdir().unwrap();
    let at = |socket: &std::path::Path, words: &[&str]| {
        fails(block().arg("--socket-path").arg(socket).arg("--blk-file").arg(image.path()), 2, words);
    };
    at(&directory.path().join("x".repeat(108)), &["--socket-path has ", "at most 107"]);
    let datagrams = directory.path().join("d");
    let _other = std::os::unix::net::UnixDatagram::bind(&datagrams).unwrap();
    at(&datagrams, &["another program's socket, of another kind (datagram", "choose another --socket-path"]);
}

#[test]
fn sigusr1_says_how_it_is() {
    let image = disk(MIB);
    let mut daemon = start(&image, &["--num-queues", "2"]);
    let name = format!("cleave-block[{}]: ", daemon.pid());
    daemon.signal(Signal::USR1).unwrap();
    daemon.wait_for_log(&format!("{name}no frontend is connected; 0 requests are in flight")).unwrap();
    let mut driver = BlockDriver::connect(&daemon.socket, 2).unwrap();
    for _ in 0..3 {
        assert_eq!(driver.read(0, 4096).unwrap().0, IoStatus::Ok);
    }
    // The last answer is counted when the thread is about to sleep.
    let line = "a frontend is connected, 2 of 2 queues run; 0 requests are in flight, 0 of them waiting for room or \
        for a rate limit; 3 were served";
    while !daemon.log().contains(line) {
        daemon.signal(Signal::USR1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(daemon.is_running() && daemon.log().len() < 1 << 20, "{}", daemon.log());
    }
}

#[test]
fn a_disk_that_will_not_do_is_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let socket = at("socket");
    let on = |path: &std::path::Path, code, words: &[&str]| {
        let name = path.display().to_string();
        fails(
            block().arg("--socket-path").arg(&socket).arg("--blk-file").arg(path),
            code,
            &[&[name.as_str()], words].concat(),
        );
        assert!(!socket.exists(), "a daemon that cannot start leaves no socket");
    };
    on(&at("missing"), 2, &["No such file"]);
    on(directory.path(), 2, &["neither a regular file nor a block device"]);
    on(std::path::Path::new("/dev/null"), 2, &["neither a regular file nor a block device"]);
    fs::write(at("empty"), b"").unwrap();
    on(&at("empty"), 2, &["empty"]);
    fs::write(at("odd"), [0; 1000]).unwrap();
    on(&at("odd"), 2, &["1000 bytes", "not a multiple of 512", "1024"]);
    symlink("loop", at("loop")).unwrap();
    on(&at("loop"), 3, &["symbolic links"]);
}

#[test]
fn a_disk_in_use_names_its_user() {
    let image = disk(MIB);
    let path = image.path().to_str().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let second = |args: &[&str]| {
        let mut command = block();
        command.arg("--socket-path").arg(&socket).args(["--blk-file", path]).args(args);
        command
    };
    let writer = start(&image, &[]);
    let who = format!("cleave-block (process {})", writer.pid());
    fails(&mut second(&[]), 3, &["is in use", &who]);
    fails(&mut second(&["--read-only"]), 3, &["is in use", &who]);
    drop(writer);

    let _reader = start(&image, &["--read-only"]);
    fails(&mut second(&[]), 3, &["is in use"]);
    let mut other_reader = start(&image, &["--read-only"]);
    assert!(other_reader.is_running());
}

#[test]
fn sockets_that_are_in_the_way() {
    let image = disk(MIB);
    let other = disk(MIB);
    let path = other.path().to_str().unwrap();
    let daemon = start(&image, &[]);
    fails(
        block().arg("--socket-path").arg(&daemon.socket).args(["--blk-file", path]),
        3,
        &["already listening"],
    );
    assert!(BlockDriver::connect(&daemon.socket, 1).is_ok(), "the daemon that was there is unharmed");

    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, b"precious").unwrap();
    fails(block().arg("--socket-path").arg(&file).args(["--blk-file", path]), 2, &["not a socket"]);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}

#[test]
fn sigterm_is_a_clean_end() {
    for busy in [false, true] {
        let image = disk(8 * MIB);
        let mut daemon = start(&image, &["--cache", "none"]);
        let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
        let data = driver.ram.allocate(100 * 4096, 4096);
        if busy {
            for n in 0..100 {
                let buffer = Buffer::to_read(data + n * 4096, 4096);
                driver.submit(0, RequestKind::Out, n * 8, &[buffer]).unwrap().unwrap();
            }
            driver.queues[0].kick_now().unwrap();
        }
        daemon.signal(Signal::TERM).unwrap();
        assert_eq!(daemon.wait().unwrap().code(), Some(0));
        assert!(!daemon.socket.exists(), "the socket is left behind");
        // What it has fetched it has completed.
        let used = driver.queues[0].used_idx();
        while driver.queues[0].pop_used(&driver.ram).unwrap().is_some() {}
        assert!(driver.queues[0].used_idx() >= used);
    }
}

#[test]
fn after_kill_it_starts_again_on_the_same_socket_and_disk() {
    let image = disk(MIB);
    let path = image.path().to_str().unwrap();
    let mut daemon = start(&image, &["--cache", "none"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_eq!(driver.write(0, &pattern(7, 512)).unwrap(), IoStatus::Ok);
    daemon.signal(Signal::KILL).unwrap();
    daemon.wait().unwrap();
    assert!(daemon.socket.exists(), "a stale socket");
    let _successor =
        Killed(block().arg("--socket-path").arg(&daemon.socket).args(["--blk-file", path]).spawn().unwrap());
    let deadline = Instant::now() + Duration::from_secs(10);
    while UnixStream::connect(&daemon.socket).is_err() {
        assert!(Instant::now() < deadline, "the successor does not listen");
        std::thread::sleep(Duration::from_millis(2));
    }
    driver.reconnect(&daemon.socket).unwrap();
    assert_eq!(driver.read(0, 512).unwrap(), (IoStatus::Ok, pattern(7, 512)));
}

#[test]
fn it_serves_an_inherited_connection_and_ends_with_it() {
    let image = disk(MIB);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut child = inherit(theirs.into(), &image);
    let mut driver = BlockDriver::start(Frontend::over(ours), u64::MAX, 1, 64).unwrap();
    assert_eq!(driver.read(0, 4096).unwrap().0, IoStatus::Ok);
    drop(driver);
    assert_eq!(child.0.wait().unwrap().code(), Some(0));
}

#[test]
fn an_inherited_socket_of_another_kind_is_refused() {
    let (_ours, theirs) = UnixDatagram::pair().unwrap();
    let mut child = inherit(theirs.into(), &disk(MIB));
    assert_eq!(child.0.wait().unwrap().code(), Some(2));
}

#[test]
fn it_listens_on_an_inherited_listener() {
    let image = disk(MIB);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("activated");
    let listener = UnixListener::bind(&path).unwrap();
    let child = inherit(listener.into(), &image);
    for _ in 0..3 {
        let mut driver = BlockDriver::connect(&path, 1).unwrap();
        assert_eq!(driver.read(0, 4096).unwrap().0, IoStatus::Ok);
    }
    drop(child);
    assert!(path.exists(), "a socket that was given is not ours to remove");
}

#[test]
fn the_daemon_is_small_and_its_threads_are_named() {
    let image = disk(16 * MIB);
    let daemon: Daemon = start(&image, &["--cache", "none", "--num-queues", "2"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 2).unwrap();
    for sector in 0..1000 {
        assert_eq!(driver.read(sector * 8, 4096).unwrap().0, IoStatus::Ok);
    }
    // An optimised build is measured by block-bench, and takes half of that.
    let own = daemon.process().memory().unwrap();
    assert!(own <= 3 * MIB, "{} KiB", own >> 10);
    let threads = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap().flatten();
    let mut names: Vec<String> = threads
        .map(|task| fs::read_to_string(task.path().join("comm")).unwrap().trim().to_owned())
        .filter(|name| !name.starts_with("iou-wrk"))
        .collect();
    names.sort();
    assert_eq!(names, ["cleave-block", "queue0", "queue1"]);
}

/// `/proc/PID/task/TID/status` of each thread.
fn thread_states(pid: u32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    threads.map(|task| fs::read_to_string(task.path().join("status")).unwrap()).collect()
}

fn has(state: &str, key: &str, value: &str) -> bool {
    state.lines().any(|line| line.strip_prefix(key).is_some_and(|rest| rest.trim() == value))
}

#[test]
fn each_thread_is_confined_unless_somebody_debugs() {
    assert_confined(&start(&disk(MIB), &["--num-queues", "2"]), 3);
    let qcow2 = disk(MIB);
    let mut tool = Command::new("qemu-img");
    assert!(
        tool.args(["create", "-q", "-f", "qcow2"]).arg(qcow2.path()).arg("1M").status().unwrap().success()
    );
    assert_confined(&start(&qcow2, &["--num-queues", "2", "--format", "qcow2"]), 4);
    let open = start(&disk(MIB), &["--sandbox", "off"]);
    assert!(has(&thread_states(open.pid())[0], "Seccomp:", "0"));
    open.wait_for_log("no sandbox").unwrap();
}

fn assert_confined(daemon: &Daemon, threads: usize) {
    let mut driver = BlockDriver::connect(&daemon.socket, 2).unwrap();
    assert_eq!(driver.read(0, 4096).unwrap().0, IoStatus::Ok);
    let states = thread_states(daemon.pid());
    assert!(states.len() >= threads);
    for state in states {
        assert!(has(&state, "NoNewPrivs:", "1") && has(&state, "Seccomp:", "2"), "{state}");
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            // The bounding set is root's to empty.
            let kept = set == "CapBnd:" && !rustix::process::geteuid().is_root();
            assert!(kept || has(&state, set, "0000000000000000"), "{state}");
        }
    }
}

/// I/O rings count as locked memory, of which a container's root may have little, and no way to get more.
#[test]
fn rings_are_not_charged_to_whoever_may_lock_memory() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("not tested: only root may lock memory past its limit");
    }
    let image = disk(MIB);
    let block = binary("cleave-block").unwrap();
    for (lacks, starts) in [("-sys_resource", true), ("-sys_resource,-ipc_lock", false)] {
        let mut command = Command::new("prlimit");
        command.args(["--memlock=4096:4096", "setpriv", "--bounding-set", lacks]).arg(&block);
        command.arg("--blk-file").arg(image.path()).args(["--num-queues", "4", "--fd", "3"]);
        let (ours, theirs) = UnixStream::pair().unwrap();
        command.fd_mappings(vec![FdMapping { parent_fd: theirs.into(), child_fd: 3 }]).unwrap();
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        drop(command);
        let negotiated = Frontend::over(ours).negotiate(u64::MAX);
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        // Kernels 5.12 to 6.13 charge no rings, and then none needs the capability.
        assert_eq!(negotiated.is_ok(), starts || output.status.success(), "{lacks}: {said}");
        assert!(output.status.success() || said.contains("raise 'ulimit -l'"), "{lacks}: {said}");
    }
}

#[test]
fn no_descriptor_comes_along_by_mistake() {
    let image = disk(MIB);
    let secret = disk(MIB);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let other = |child_fd| FdMapping { parent_fd: secret.as_file().try_clone().unwrap().into(), child_fd };
    let child = inherit_also(theirs.into(), vec![other(4), other(77)], &image);
    let mut driver = BlockDriver::start(Frontend::over(ours), u64::MAX, 1, 64).unwrap();
    assert_eq!(driver.read(0, 4096).unwrap().0, IoStatus::Ok);
    let links = fs::read_dir(format!("/proc/{}/fd", child.0.id())).unwrap().flatten();
    let disk = image.path().canonicalize().unwrap().display().to_string();
    let kinds = [
        "socket:",
        "anon_inode:[eventfd]",
        "anon_inode:[signalfd]",
        "anon_inode:[io_uring]",
        "/memfd:",
        &disk,
    ];
    for link in links.filter(|link| link.file_name().to_str().unwrap().parse::<u32>().unwrap() > 2) {
        let target = fs::read_link(link.path()).unwrap().display().to_string();
        assert!(kinds.iter().any(|kind| target.starts_with(kind)), "{target}");
    }
}

#[test]
fn sighup_looks_at_the_disk_again() {
    let image = disk(MIB);
    let mut daemon = start(&image, &[]);
    for connected in [false, true] {
        let driver = connected.then(|| BlockDriver::connect(&daemon.socket, 1).unwrap());
        let before = daemon.log().matches("reloaded").count();
        daemon.signal(Signal::HUP).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while daemon.log().matches("reloaded").count() == before {
            assert!(Instant::now() < deadline, "{}", daemon.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        if let Some(mut driver) = driver {
            assert_eq!(driver.read(0, 4096).unwrap().0, IoStatus::Ok);
        }
    }
    assert!(daemon.is_running());
}
