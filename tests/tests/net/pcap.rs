//! Captures, read by tcpdump.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use cleave_tests::cache::Cache;
use cleave_tests::tools::Tools;
use rustix::process::Signal;

use super::*;

const FILE_HEADER: usize = 24;
const RECORD_HEADER: usize = 16;

/// Frames of a capture, with their lengths when they passed.
fn frames(bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(20)), (0xa1b2_3c4d, 1), "nanoseconds, Ethernet");
    let (mut at, mut frames) = (FILE_HEADER, Vec::new());
    while at < bytes.len() {
        let kept = word(at + 8) as usize;
        let start = at + RECORD_HEADER;
        frames.push((word(at + 12), bytes[start..start + kept].to_vec()));
        at = start + kept;
    }
    frames
}

/// Waits until `path` has as many frames.
fn captured(path: &Path, count: usize) -> Vec<(u32, Vec<u8>)> {
    let deadline = Instant::now() + SOON;
    loop {
        // What is there ends with a whole record, whenever one looks.
        let found = frames(&fs::read(path).unwrap());
        if found.len() >= count {
            return found;
        }
        assert!(Instant::now() < deadline, "{} of {count} frames", found.len());
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn mkfifo(path: &Path) {
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

#[test]
fn a_file_has_every_frame_as_it_passes_and_a_successor_goes_on_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("capture.pcap");
    let Some((mut net, mut driver)) = start_with_driver(&["--pcap", path.to_str().unwrap()]) else { return };
    let (there, back) = (frame(OURS, WORLDS, 1, 1000), frame(WORLDS, OURS, 2, 60));
    reaches_the_guest(&net, &mut driver, &there);
    reaches_the_world(&net, &mut driver, &back);
    assert_eq!(captured(&path, 2), [(1000, there.clone()), (60, back)]);
    net.daemon.kill_and_restart().unwrap();
    driver.resume(&net.daemon.socket.clone(), None).unwrap();
    reaches_the_guest(&net, &mut driver, &frame(OURS, WORLDS, 3, 99));
    assert_eq!(captured(&path, 3)[2], (99, frame(OURS, WORLDS, 3, 99)));
    net.daemon.signal(Signal::USR1).unwrap();
    net.daemon.wait_for_log("bytes of frames captured, 0 frames not").unwrap();
    net.daemon.signal(Signal::TERM).unwrap();
    assert_eq!(net.daemon.wait().unwrap().code(), Some(0), "{}", net.daemon.log());
    assert_eq!(captured(&path, 3)[0], (1000, there));
}

#[test]
fn as_much_of_a_frame_is_kept_as_was_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("capture.pcap");
    let args = ["--pcap", path.to_str().unwrap(), "--pcap-snaplen", "64"];
    let Some((net, mut driver)) = start_with_driver(&args) else { return };
    let there = frame(OURS, WORLDS, 1, 1000);
    reaches_the_guest(&net, &mut driver, &there);
    assert_eq!(captured(&path, 1), [(1000, there[..64].to_vec())]);
}

#[test]
fn tcpdump_reads_a_pipe_while_frames_pass_and_nobody_waits_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pipe");
    mkfifo(&path);
    // Before this thread is in a network from which nothing can be fetched.
    let tools = Tools::open(&Cache::open().unwrap()).unwrap();
    let Some((net, mut driver)) = start_with_driver(&["--pcap", path.to_str().unwrap()]) else { return };
    for round in 0..2 {
        // More than a pipe holds.
        for n in 0..100 {
            reaches_the_guest(&net, &mut driver, &frame(OURS, WORLDS, n, 1500));
        }
        let mut tcpdump = tools.command("tcpdump");
        // Debian's becomes a user of its own, who need not be here.
        tcpdump.args(["-Z", "root", "-r", path.to_str().unwrap(), "-n", "-e", "-l", "-tt"]);
        let mut child = tcpdump.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        // The reader may still be about to come: a frame that it misses is followed by others.
        let looks = std::thread::spawn(move || {
            let mut line = String::new();
            let read = said.read_line(&mut line);
            (read.is_ok() && line.contains("52:54:00:00:00:02 > 52:54:00:00:00:01"), line)
        });
        while !looks.is_finished() {
            reaches_the_guest(&net, &mut driver, &frame(OURS, WORLDS, 7, 99));
            std::thread::sleep(Duration::from_millis(5));
        }
        let (is_it, line) = looks.join().unwrap();
        let _ = child.kill();
        let mut errors = String::new();
        child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        child.wait().unwrap();
        assert!(is_it, "round {round}: {line}{errors}");
        works(&net, &mut driver);
    }
}

/// A file system with room for little.
#[test]
fn a_full_disk_ends_the_capture_and_not_the_network() {
    let directory = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "none"])
        .arg(directory.path())
        .status()
        .is_ok_and(|status| status.success());
    if !mounted {
        eprintln!("SKIPPED: this user may not mount: run this as root");
        return;
    }
    let path = directory.path().join("capture.pcap");
    if let Some((net, mut driver)) = start_with_driver(&["--pcap", path.to_str().unwrap()]) {
        for n in 0..100 {
            reaches_the_guest(&net, &mut driver, &frame(OURS, WORLDS, n, 1500));
        }
        net.daemon.wait_for_log("the capture is over, the network goes on").unwrap();
        works(&net, &mut driver);
        let found = frames(&fs::read(&path).unwrap());
        assert!(!found.is_empty() && found.len() < 100, "{}", found.len());
    }
    assert!(Command::new("umount").arg(directory.path()).status().unwrap().success());
}

#[test]
fn what_cannot_be_captured_to_is_refused() {
    if network::enter().is_none() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let letter = directory.path().join("letter");
    fs::write(&letter, "Dear Sir,").unwrap();
    for (path, words) in [
        (letter.to_str().unwrap(), "no capture with this snaplen to go on with"),
        (directory.path().to_str().unwrap(), "it takes a file, or a pipe made with mkfifo"),
        ("/nowhere/capture", "No such file or directory"),
    ] {
        let error =
            Daemon::start("cleave-net", &["--tap", "tap0", "--pcap", path]).err().unwrap().to_string();
        assert!(error.contains(words) && error.contains("exit status: 2"), "{error}");
    }
    assert_eq!(fs::read(&letter).unwrap(), b"Dear Sir,");
}
