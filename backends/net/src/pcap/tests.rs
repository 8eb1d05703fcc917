use std::fs;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use super::*;

const SNAPLEN: u32 = 100;

fn records(count: usize, kept: usize) -> Vec<u8> {
    let one = |n: usize| {
        let mut record = record_header(SystemTime::now(), kept as u32, 1500).to_vec();
        record.resize(RECORD_HEADER + kept, n as u8);
        record
    };
    (0..count).flat_map(one).collect()
}

fn write(path: &Path, records: &mut Vec<u8>) {
    Output::open(path, SNAPLEN).unwrap().write(records).unwrap();
    assert!(records.is_empty());
}

#[test]
fn a_file_is_gone_on_with_behind_its_last_whole_record() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("capture");
    write(&path, &mut records(3, 60));
    let whole = FILE_HEADER + 3 * (RECORD_HEADER + 60);
    for cut_off in [0, 1, RECORD_HEADER, RECORD_HEADER + 59] {
        let mut bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len(), whole);
        bytes.extend(&records(1, 60)[..cut_off]);
        fs::write(&path, &bytes).unwrap();
        write(&path, &mut Vec::new());
    }
    write(&path, &mut records(2, 7));
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len(), whole + 2 * (RECORD_HEADER + 7));
    assert_eq!(bytes[..FILE_HEADER], file_header(SNAPLEN));
}

#[test]
fn what_is_no_capture_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("letters");
    for content in [&b"Dear Sir,"[..], &file_header(SNAPLEN + 1), &file_header(SNAPLEN)[..20]] {
        fs::write(&path, content).unwrap();
        assert!(matches!(Output::open(&path, SNAPLEN), Err(PcapError::OtherFile(_))));
        assert_eq!(fs::read(&path).unwrap(), content);
    }
    assert!(matches!(Output::open(directory.path(), SNAPLEN), Err(PcapError::Kind(_))));
    let nowhere = Output::open(Path::new("/nowhere/capture"), SNAPLEN);
    assert!(nowhere.unwrap_err().to_string().contains("--pcap /nowhere/capture: No such file"));
}

#[test]
fn a_full_disk_ends_the_capture() {
    let mut output = Output::File { file: File::options().write(true).open("/dev/full").unwrap(), len: 0 };
    let error = output.write(&mut records(1, 60)).unwrap_err();
    assert!(error.to_string().contains("No space left"), "{error}");
}

fn make_pipe(path: &Path) {
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

/// Until the writer has seen what it is to see.
fn until(what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !what() {
        assert!(Instant::now() < deadline, "it never came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn each_reader_of_a_pipe_starts_with_the_header() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pipe");
    make_pipe(&path);
    let capture = Capture::start(Output::open(&path, SNAPLEN).unwrap(), SNAPLEN).unwrap();
    let put = |count: usize| {
        capture.shared.waiting().extend(records(count, 60));
        capture.shared.wake();
    };
    let idle = || capture.shared.waiting().is_empty();
    for round in 0..3 {
        // Nobody reads: nothing is kept, and nobody waits.
        put(100_000);
        until(idle);
        let mut reader = File::open(&path).unwrap();
        let mut header = [0; FILE_HEADER];
        reader.read_exact(&mut header).unwrap();
        assert_eq!(header, file_header(SNAPLEN), "round {round}");
        put(2);
        let mut bytes = vec![0; 2 * (RECORD_HEADER + 60)];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[8..12], 60u32.to_ne_bytes());
        // More than a pipe holds, of which this one reads a part only.
        put(10_000);
        reader.read_exact(&mut bytes[..100]).unwrap();
    }
}

#[test]
fn the_end_does_not_wait_for_a_reader() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pipe");
    make_pipe(&path);
    let capture = Capture::start(Output::open(&path, SNAPLEN).unwrap(), SNAPLEN).unwrap();
    let mut reader = File::open(&path).unwrap();
    reader.read_exact(&mut [0; FILE_HEADER]).unwrap();
    capture.shared.waiting().extend(records(10_000, 60));
    capture.shared.wake();
    drop(capture);
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    assert!(!rest.is_empty());
}
