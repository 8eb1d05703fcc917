use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use proptest::prelude::*;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::*;
use crate::image::{CacheMode, ImageFormat, ImageOptions};

const LEN: usize = 1 << 20;

fn content() -> Vec<u8> {
    (0..LEN).map(|at| (at / 512) as u8 ^ at as u8).collect()
}

fn engine(cache: CacheMode, depth: u16) -> (tempfile::NamedTempFile, Engine) {
    let mut file =
        tempfile::NamedTempFile::new_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target")).unwrap();
    file.write_all(&content()).unwrap();
    let options =
        ImageOptions { path: file.path().to_owned(), format: ImageFormat::Raw, read_only: false, cache };
    let engine = Engine::new(Arc::new(Image::open(&options).unwrap()), depth).unwrap();
    (file, engine)
}

pub(crate) fn iovec(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

pub(crate) fn done(engine: &mut Engine) -> (u16, io::Result<()>) {
    loop {
        match engine.next_event() {
            Some(Event::Done { tag, result }) => return (tag, result),
            Some(other) => panic!("{other:?}"),
            None => engine.wait().unwrap(),
        }
    }
}

fn transfer(engine: &mut Engine, what: Transfer, buffers: &mut [&mut [u8]]) -> io::Result<()> {
    let buffers: Vec<_> = buffers.iter_mut().map(|buffer| iovec(buffer)).collect();
    // SAFETY: the caller's buffers outlive this call, which ends with the event.
    unsafe { engine.transfer(3, what, buffers) };
    let (tag, result) = done(engine);
    assert_eq!((tag, engine.in_flight()), (3, 0));
    result
}

#[test]
fn bytes_go_both_ways_whatever_their_alignment() {
    for cache in [CacheMode::None, CacheMode::Writeback, CacheMode::Writethrough] {
        let (mut file, mut engine) = engine(cache, 8);
        let mut expected = content();
        for shift in [0, 1, 512] {
            // Longer than a piece of aligned memory.
            let mut memory = vec![shift as u8 + 1; (300 << 10) + shift];
            let bytes = &mut memory[shift..];
            expected[4096..4096 + bytes.len()].copy_from_slice(bytes);
            transfer(&mut engine, Transfer::write(4096, shift == 1), &mut [bytes]).unwrap();

            let mut memory = vec![0; (300 << 10) + 4096 + shift];
            let (a, b) = memory[shift..].split_at_mut(5);
            transfer(&mut engine, Transfer::read(0), &mut [a, b]).unwrap();
            assert!(memory[shift..] == expected[..memory.len() - shift], "{cache:?} shifted by {shift}");
        }
        engine.flush(0);
        done(&mut engine).1.unwrap();
        let mut on_disk = Vec::new();
        file.reopen().unwrap().read_to_end(&mut on_disk).unwrap();
        assert!(on_disk == expected);
        file.flush().unwrap();
    }
}

#[test]
fn nothing_to_move_is_done_at_once() {
    let (_file, mut engine) = engine(CacheMode::None, 8);
    transfer(&mut engine, Transfer::read(0), &mut []).unwrap();
    transfer(&mut engine, Transfer::write(0, false), &mut [&mut []]).unwrap();
}

#[test]
fn an_end_before_the_end_is_an_error() {
    let (file, mut engine) = engine(CacheMode::Writeback, 8);
    file.as_file().set_len(1000).unwrap();
    let mut memory = vec![0; 1536];
    let error = transfer(&mut engine, Transfer::read(0), &mut [&mut memory]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn more_requests_than_the_kernels_queue_holds() {
    const DEPTH: u16 = 1024;
    let (_file, mut engine) = engine(CacheMode::Writeback, DEPTH);
    let mut memory = vec![0; usize::from(DEPTH) * 512];
    for (tag, block) in memory.chunks_mut(512).enumerate() {
        // SAFETY: `memory` lives until all events have come.
        unsafe { engine.transfer(tag as u16, Transfer::read(tag as u64 * 512), [iovec(block)]) };
        assert!(engine.is_busy(tag as u16));
    }
    let mut seen = vec![false; usize::from(DEPTH)];
    while engine.in_flight() > 0 {
        let (tag, result) = done(&mut engine);
        result.unwrap();
        assert!(!std::mem::replace(&mut seen[usize::from(tag)], true), "{tag} twice");
    }
    assert!(memory == content()[..memory.len()]);
}

#[test]
fn aligned_memory_is_bounded() {
    const LEN: usize = 128 << 10;
    let (_file, mut engine) = engine(CacheMode::None, 64);
    let mut memory = vec![0; LEN + 1];
    let mut tag = 0;
    while engine.has_room() {
        // SAFETY: `memory` lives until all events have come.
        unsafe { engine.transfer(tag, Transfer::read(0), [iovec(&mut memory[1..])]) };
        tag += 1;
    }
    assert_eq!(usize::from(tag), MAX_BOUNCED / LEN);
    done(&mut engine).1.unwrap();
    assert!(engine.has_room());
    while engine.in_flight() > 0 {
        done(&mut engine).1.unwrap();
    }
    assert_eq!(engine.bounced, 0);
}

fn ranges(engine: &mut Engine, op: RangeOp, ranges: &[(u64, u64)]) -> io::Result<()> {
    let ranges = ranges.iter().map(|(offset, len)| Range { offset: *offset, len: *len }).collect();
    engine.park_ranges(5, op, ranges);
    assert!(engine.is_busy(5) && engine.in_flight() == 0);
    engine.submit(5);
    let (tag, result) = done(engine);
    assert_eq!((tag, engine.in_flight()), (5, 0));
    result
}

/// Whatever the file system of the build knows, and then without its help.
#[test]
fn zeroed_ranges_read_as_zeroes_and_nothing_else_changes() {
    const RANGES: [(u64, u64); 4] = [(512, 512), (8192, 0), (65536, 300 << 10), (1 << 19, 4096)];
    let mut expected = content();
    for (offset, len) in RANGES {
        expected[offset as usize..(offset + len) as usize].fill(0);
    }
    for unsupported in [false, true] {
        for (unmap, durable) in [(false, false), (true, false), (false, true), (true, true)] {
            for cache in [CacheMode::None, CacheMode::Writeback] {
                let (file, mut engine) = engine(cache, 8);
                if unsupported {
                    engine.disks[0].as_mut().unwrap().support.nothing();
                }
                ranges(&mut engine, RangeOp::WriteZeroes { unmap, durable }, &RANGES).unwrap();
                let mut on_disk = Vec::new();
                file.reopen().unwrap().read_to_end(&mut on_disk).unwrap();
                assert!(on_disk == expected, "{cache:?} unmap {unmap} durable {durable} {unsupported}");
            }
        }
    }
}

#[test]
fn a_discarded_range_gives_its_storage_back_and_the_rest_stays() {
    use std::os::unix::fs::MetadataExt;
    let (file, mut engine) = engine(CacheMode::Writeback, 8);
    file.as_file().sync_all().unwrap();
    let blocks = || file.as_file().metadata().unwrap().blocks();
    let before = blocks();
    ranges(&mut engine, RangeOp::Discard, &[(65536, 1 << 19), (4096, 4096)]).unwrap();
    assert!(blocks() <= before - ((1 << 19) + 4096) / 512, "{} of {before} blocks are left", blocks());
    let mut on_disk = Vec::new();
    file.reopen().unwrap().read_to_end(&mut on_disk).unwrap();
    assert_eq!(on_disk.len(), LEN);
    assert!(on_disk[..4096] == content()[..4096] && on_disk[600 << 10..] == content()[600 << 10..]);

    engine.disks[0].as_mut().unwrap().support.nothing();
    ranges(&mut engine, RangeOp::Discard, &[(0, 4096)]).unwrap();
    let mut first = vec![0; 4096];
    transfer(&mut engine, Transfer::read(0), &mut [&mut first]).unwrap();
    assert!(first == content()[..4096], "advice that nobody can take changes nothing");
}

#[test]
fn what_a_readonly_file_refuses_is_an_error() {
    let (file, _) = engine(CacheMode::Writeback, 8);
    let options = ImageOptions {
        path: file.path().to_owned(),
        format: ImageFormat::Raw,
        read_only: true,
        cache: CacheMode::Writeback,
    };
    let mut engine = Engine::new(Arc::new(Image::open(&options).unwrap()), 8).unwrap();
    let op = RangeOp::WriteZeroes { unmap: true, durable: false };
    assert_eq!(ranges(&mut engine, op, &[(0, 4096)]).unwrap_err().raw_os_error(), Some(libc::EBADF));
}

#[test]
fn a_parked_request_waits_until_it_is_submitted_or_abandoned() {
    let (_file, mut engine) = engine(CacheMode::None, 8);
    let mut memory = vec![0; 4097];
    for abandon in [true, false] {
        // SAFETY: `memory` lives until the event, or the end of a request that is never submitted.
        unsafe { engine.park_transfer(2, Transfer::read(0), [iovec(&mut memory[1..])]) };
        assert!(engine.is_busy(2) && engine.in_flight() == 0 && engine.bounced != 0);
        engine.poll().unwrap();
        assert!(engine.next_event().is_none());
        if abandon {
            engine.abandon(2);
            assert!(!engine.is_busy(2) && engine.bounced == 0);
        } else {
            engine.submit(2);
            done(&mut engine).1.unwrap();
        }
    }
    assert!(memory[1..] == content()[..4096]);
}

#[test]
#[should_panic(expected = "is not parked")]
fn what_the_kernel_has_is_not_abandoned() {
    let (_file, mut engine) = engine(CacheMode::Writeback, 8);
    engine.flush(1);
    engine.abandon(1);
}

#[test]
fn a_wait_ends_with_its_timeout_or_an_event() {
    let (_file, mut engine) = engine(CacheMode::Writeback, 8);
    assert!(!engine.has_news());
    let before = std::time::Instant::now();
    engine.wait_for(Duration::from_millis(20)).unwrap();
    assert!(before.elapsed() >= Duration::from_millis(20));
    assert!(engine.next_event().is_none());

    engine.flush(0);
    assert!(engine.has_news());
    let mut waits = 0;
    loop {
        engine.wait_for(Duration::from_secs(3600)).unwrap();
        waits += 1;
        match engine.next_event() {
            Some(Event::Done { tag: 0, result }) => break result.unwrap(),
            other => assert!(other.is_none() && waits < 100, "{other:?}"),
        }
    }
}

#[test]
fn watches_report_each_edge_until_they_end() {
    let (_file, mut engine) = engine(CacheMode::Writeback, 8);
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let id = engine.watch(event.as_fd());
    engine.poll().unwrap();
    assert!(engine.next_event().is_none());
    for _ in 0..100 {
        rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
        engine.wait().unwrap();
        assert!(matches!(engine.next_event(), Some(Event::Readable(got)) if got == id));
        assert!(engine.next_event().is_none());
    }
    engine.unwatch(id);
    engine.poll().unwrap();
    rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
    engine.poll().unwrap();
    assert!(engine.next_event().is_none());

    // A descriptor that hangs up is given up.
    let (read_end, write_end) = rustix::pipe::pipe().unwrap();
    let id = engine.watch(read_end.as_fd());
    drop(write_end);
    engine.wait().unwrap();
    assert!(matches!(engine.next_event(), Some(Event::WatchLost(got)) if got == id));
    engine.poll().unwrap();
    assert!(engine.next_event().is_none());
}

#[test]
fn a_watch_that_ended_holds_no_file() {
    let (_file, mut engine) = engine(CacheMode::Writeback, 8);
    let (read_end, write_end) = rustix::pipe::pipe().unwrap();
    let id = engine.watch(read_end.as_fd());
    engine.poll().unwrap();
    engine.unwatch(id);
    drop(read_end);
    let mut fds = [PollFd::new(&write_end, PollFlags::OUT)];
    poll(&mut fds, Some(&Timespec::default())).unwrap();
    assert!(fds[0].revents().contains(PollFlags::ERR), "the pipe has a reader");
}

#[test]
#[should_panic(expected = "is in flight")]
fn a_tag_is_used_once_at_a_time() {
    let (_file, mut engine) = engine(CacheMode::Writeback, 8);
    engine.flush(1);
    engine.flush(1);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn any_cut_reads_what_is_there(cuts in prop::collection::vec(1usize..3000, 1..40), shift in 0usize..600, sector in 0u64..500) {
        let (_file, mut engine) = engine(CacheMode::None, 8);
        let total: usize = cuts.iter().sum::<usize>() / 512 * 512;
        let mut memory = vec![0; total + shift];
        let mut rest = &mut memory[shift..];
        let mut buffers: Vec<&mut [u8]> = Vec::new();
        for cut in cuts {
            let (buffer, later) = rest.split_at_mut(cut.min(rest.len()));
            buffers.push(buffer);
            rest = later;
        }
        transfer(&mut engine, Transfer::read(sector * 512), &mut buffers).unwrap();
        let from = sector as usize * 512;
        prop_assert!(memory[shift..] == content()[from..from + total]);
    }
}

#[test]
fn images_come_and_go_while_others_are_used() {
    let (_file, mut engine) = engine(CacheMode::Writeback, 8);
    let mut other = tempfile::tempfile().unwrap();
    other.write_all(&[7; 4096]).unwrap();
    let options = |read_only| ImageOptions {
        path: "the other".into(),
        format: ImageFormat::Raw,
        read_only,
        cache: CacheMode::Writeback,
    };
    let image = Arc::new(Image::from_file(other, &options(true)).unwrap());
    let there = engine.attach(image.clone()).unwrap();
    let mut buffers = [vec![0; 4096], vec![0; 4096]];
    for (tag, disk) in [(0, DiskId::FIRST), (1, there)] {
        engine.select(disk);
        let buffer = iovec(&mut buffers[usize::from(tag)]);
        // SAFETY: the buffers live until both are done.
        unsafe { engine.transfer(tag, Transfer::read(0), [buffer]) };
    }
    for _ in 0..2 {
        done(&mut engine).1.unwrap();
    }
    assert_eq!(buffers[0], content()[..4096]);
    assert_eq!(buffers[1], [7; 4096]);

    engine.detach(there);
    assert_eq!(Arc::strong_count(&image), 1, "nothing of it is left");
    let again = engine.attach(image).unwrap();
    assert_eq!(again, there);
}

#[test]
fn a_file_that_is_handed_over_is_open_for_what_it_is_for() {
    let options = ImageOptions {
        path: "handed".into(),
        format: ImageFormat::Raw,
        read_only: false,
        cache: CacheMode::Writeback,
    };
    let read_only = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).unwrap();
    let refused = Image::from_file(read_only, &options).unwrap_err();
    assert!(refused.to_string().contains("wrong kind of access"), "{refused}");
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    let options = ImageOptions { read_only: true, ..options };
    let refused = Image::from_file(pipe.into(), &options).unwrap_err();
    assert!(refused.to_string().contains("neither a regular file"), "{refused}");
}
