//! cleave-block on qcow2 images, with QEMU's own tools on the other side: they make the images, and judge them afterwards.

mod common;

use std::collections::HashMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use cleave_tests::cache::{Cache, target_directory};
use cleave_tests::driver::{
    BlockDriver, Buffer, Daemon, DriverError, IoStatus, PATIENCE, RequestKind, binary,
};
use cleave_tests::tools::Tools;
use command_fds::{CommandFdExt, FdMapping};
use common::{MIB, pattern, tmpfs};
use rustix::process::Signal;
use tempfile::TempDir;

/// A directory of images.
struct Bench {
    tools: Tools,
    directory: TempDir,
}

impl Bench {
    fn new() -> Self {
        let place = target_directory().join("tmp");
        fs::create_dir_all(&place).unwrap();
        let directory = tempfile::Builder::new().prefix("qcow2").tempdir_in(place).unwrap();
        Self { tools: Tools::open(&Cache::open().unwrap()).unwrap(), directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn try_qemu(&self, program: &str, args: &str) -> Output {
        let mut command = self.tools.command(program);
        command.current_dir(self.directory.path()).args(args.split(' '));
        command.output().unwrap()
    }

    /// 'qemu-img' with these words, in the directory; what it says.
    fn img(&self, args: &str) -> String {
        let output = self.try_qemu("qemu-img", args);
        assert!(output.status.success(), "qemu-img {args}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn io(&self, image: &str, command: &str) {
        let mut io = self.tools.command("qemu-io");
        io.current_dir(self.directory.path()).args(["-f", "qcow2", "-c", command, image]);
        let output = io.output().unwrap();
        assert!(output.status.success(), "qemu-io {command}: {output:?}");
    }

    fn file(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// The disk, as QEMU reads it.
    fn content(&self, image: &str) -> Vec<u8> {
        self.img(&format!("convert -f qcow2 -O raw {image} content"));
        fs::read(self.path("content")).unwrap()
    }

    /// Errors in the tables, and whether clusters are leaked; of a copy, so that a daemon may have the image. The locks of
    /// one that was killed, on a backing file for one, go with its rings, a moment later.
    fn check(&self, image: &str) -> (bool, bool) {
        fs::copy(self.path(image), self.path("copy")).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let output = loop {
            let output = self.try_qemu("qemu-img", "check -f qcow2 copy");
            let is_locked = String::from_utf8_lossy(&output.stderr).contains(" lock");
            if !is_locked || Instant::now() > deadline {
                break output;
            }
        };
        match output.status.code() {
            Some(0) => (false, false),
            Some(3) => (false, true),
            _ => {
                eprintln!("{output:?}");
                (true, false)
            }
        }
    }

    fn start(&self, image: &str, args: &[&str]) -> Daemon {
        let path = self.path(image);
        let mut all = vec!["--blk-file", path.to_str().unwrap(), "--format", "qcow2"];
        all.extend(args);
        Daemon::start("cleave-block", &all).unwrap()
    }
}

fn end(mut daemon: Daemon) {
    daemon.signal(Signal::TERM).unwrap();
    assert!(daemon.wait().unwrap().success());
}

fn read_all(driver: &mut BlockDriver, len: usize) -> Vec<u8> {
    const CHUNK: usize = 1 << 20;
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let now = CHUNK.min(len - bytes.len());
        let (status, part) = driver.read(bytes.len() as u64 / 512, now as u32).unwrap();
        assert_eq!(status, IoStatus::Ok);
        bytes.extend(part);
    }
    bytes
}

/// Writes of many lengths at many places, some of them more than once; `expected` follows.
fn write_here_and_there(driver: &mut BlockDriver, expected: &mut [u8], seed: u64) {
    let sectors = expected.len() / 512;
    for n in 0..60u64 {
        let len = [4096, 512, 65536, 8192, 200 << 10][(n % 5) as usize];
        // 4096 is the most that any disk of a test may want.
        let sector = ((n + seed) * 7919 * 8) as usize % (sectors - len / 512) / 8 * 8;
        let len = len.next_multiple_of(4096);
        let bytes = pattern(n + seed, len);
        assert_eq!(driver.write(sector as u64, &bytes).unwrap(), IoStatus::Ok);
        expected[sector * 512..][..len].copy_from_slice(&bytes);
    }
}

#[test]
fn what_the_guest_writes_qemu_reads() {
    for (create, cache) in [
        ("", "none"),
        ("-o cluster_size=4k", "none"),
        ("-o cluster_size=512", "writeback"),
        ("-o cluster_size=2M", "writethrough"),
        ("-o compat=0.10", "writeback"),
        ("-o refcount_bits=1", "writeback"),
        ("-o preallocation=metadata", "none"),
        ("-o lazy_refcounts=on", "writeback"),
    ] {
        let bench = Bench::new();
        bench.img(format!("create -q -f qcow2 {create} disk 8M").replace("  ", " ").as_str());
        let daemon = bench.start("disk", &["--cache", cache]);
        let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
        assert_eq!(driver.config().unwrap().sectors, 8 * MIB / 512);
        let mut expected = vec![0; 8 << 20];
        write_here_and_there(&mut driver, &mut expected, 1);
        assert!(read_all(&mut driver, 8 << 20) == expected, "{create} {cache}");
        assert_eq!(driver.flush().unwrap(), IoStatus::Ok);
        end(daemon);
        assert!(bench.content("disk") == expected, "{create} {cache}: QEMU reads something else");
        assert_eq!(bench.check("disk"), (false, false), "{create} {cache}");
    }
}

#[test]
fn what_qemu_writes_the_guest_reads() {
    const LEN: usize = 6 << 20;
    for options in ["", "-c", "-c -o cluster_size=4k", "-o compat=0.10", "-o cluster_size=2M", "-S 4k"] {
        let bench = Bench::new();
        // Half of it compresses well, some of it is zeros.
        let mut expected = pattern(3, LEN);
        expected[1 << 20..2 << 20].fill(0);
        expected.chunks_mut(4096).step_by(2).for_each(|chunk| chunk[64..].fill(7));
        bench.file("raw", &expected);
        bench.img(format!("convert -f raw -O qcow2 {options} raw disk").replace("  ", " ").as_str());
        for cache in ["none", "writeback"] {
            let daemon = bench.start("disk", &["--cache", cache]);
            let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
            assert!(read_all(&mut driver, LEN) == expected, "{options} {cache}");
            write_here_and_there(&mut driver, &mut expected, cache.len() as u64);
            assert!(read_all(&mut driver, LEN) == expected, "{options} {cache}, written over");
            assert_eq!(driver.flush().unwrap(), IoStatus::Ok);
            end(daemon);
            assert!(bench.content("disk") == expected, "{options} {cache}");
            assert_eq!(bench.check("disk"), (false, false), "{options} {cache}");
        }
    }
}

#[test]
fn a_chain_of_backing_files() {
    const LEN: usize = 4 << 20;
    let bench = Bench::new();
    let base = pattern(5, 3 << 20);
    bench.file("base", &base);
    bench.img("create -q -f qcow2 -b base -F raw middle 3M");
    bench.io("middle", "write -P 0x11 64k 200k");
    bench.io("middle", "write -z 1M 128k");
    bench.img("create -q -f qcow2 -o cluster_size=32k -b middle -F qcow2 top 4M");
    bench.io("top", "write -P 0x22 100k 4k");
    let middle = fs::read(bench.path("middle")).unwrap();
    let mut expected = bench.content("top");
    assert_eq!((expected.len(), expected[100 << 10], expected[65 << 10]), (LEN, 0x22, 0x11));
    for cache in ["none", "writeback"] {
        let daemon = bench.start("top", &["--cache", cache, "--num-queues", "2"]);
        let mut driver = BlockDriver::connect(&daemon.socket, 2).unwrap();
        assert!(read_all(&mut driver, LEN) == expected, "{cache}");
        write_here_and_there(&mut driver, &mut expected, cache.len() as u64);
        assert!(read_all(&mut driver, LEN) == expected, "{cache}");
        assert_eq!(driver.flush().unwrap(), IoStatus::Ok);
        end(daemon);
        assert!(bench.content("top") == expected, "{cache}");
        assert_eq!(bench.check("top"), (false, false), "{cache}");
    }
    assert!(fs::read(bench.path("base")).unwrap() == base, "the base was written");
    assert!(fs::read(bench.path("middle")).unwrap() == middle, "the middle was written");
}

#[test]
fn a_snapshot_keeps_what_it_has() {
    const LEN: usize = 4 << 20;
    let bench = Bench::new();
    let old = pattern(8, LEN);
    bench.file("raw", &old);
    bench.img("convert -f raw -O qcow2 raw disk");
    bench.img("snapshot -c before disk");
    let mut expected = old.clone();
    let daemon = bench.start("disk", &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    write_here_and_there(&mut driver, &mut expected, 4);
    assert!(read_all(&mut driver, LEN) == expected);
    end(daemon);
    assert!(bench.content("disk") == expected);
    bench.img("convert -f qcow2 -l before -O raw disk old");
    assert!(fs::read(bench.path("old")).unwrap() == old);
    assert_eq!(bench.check("disk"), (false, false));
}

#[test]
fn discarded_and_zeroed_ranges() {
    const LEN: usize = 4 << 20;
    for (create, backed) in [("", false), ("-o compat=0.10", false), ("-b base -F raw", true)] {
        let bench = Bench::new();
        bench.file("base", &pattern(6, LEN));
        bench.img(format!("create -q -f qcow2 {create} disk 4M").replace("  ", " ").as_str());
        let daemon = bench.start("disk", &["--cache", "none"]);
        let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
        let mut expected = if backed { pattern(6, LEN) } else { vec![0; LEN] };
        write_here_and_there(&mut driver, &mut expected, 2);
        for (sector, sectors, flags) in [(8, 16, 0), (1024, 2048, 1), (4096 + 8, 1000, 0), (8184, 8, 1)] {
            let segments = [(sector, sectors, flags)];
            assert_eq!(driver.deallocate(RequestKind::WriteZeroes, &segments).unwrap(), IoStatus::Ok);
            expected[sector as usize * 512..][..sectors as usize * 512].fill(0);
        }
        assert!(read_all(&mut driver, LEN) == expected, "{create}");
        assert_eq!(driver.deallocate(RequestKind::Discard, &[(2048, 1024, 0)]).unwrap(), IoStatus::Ok);
        let (status, discarded) = driver.read(2048, 512 << 10).unwrap();
        assert_eq!(status, IoStatus::Ok);
        expected[1 << 20..][..512 << 10].copy_from_slice(&discarded);
        write_here_and_there(&mut driver, &mut expected, 5);
        assert!(read_all(&mut driver, LEN) == expected, "{create}, written over");
        end(daemon);
        assert!(bench.content("disk") == expected, "{create}");
        assert_eq!(bench.check("disk"), (false, false), "{create}");
    }
}

#[test]
fn a_full_file_system_costs_only_what_finds_no_room() {
    const CHUNK: usize = 256 << 10;
    let ram = tmpfs(8 * MIB);
    let bench = Bench::new();
    let disk = ram.path().join("disk");
    bench.img(&format!("create -q -f qcow2 {} 32M", disk.display()));
    let daemon = bench.start(disk.to_str().unwrap(), &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let mut expected = vec![0; 32 << 20];
    let mut chunks = 0;
    let write = |driver: &mut BlockDriver, at: usize| {
        let bytes = pattern(at as u64, CHUNK);
        (driver.write((at * CHUNK / 512) as u64, &bytes).unwrap(), bytes)
    };
    loop {
        let (status, bytes) = write(&mut driver, chunks);
        if status != IoStatus::Ok {
            break;
        }
        expected[chunks * CHUNK..][..CHUNK].copy_from_slice(&bytes);
        chunks += 1;
    }
    assert!((16..32).contains(&chunks), "{chunks} found room");
    assert!(!bench.check(disk.to_str().unwrap()).0);
    ram.resize(64 * MIB);
    for at in chunks..chunks + 20 {
        let (status, bytes) = write(&mut driver, at);
        assert_eq!(status, IoStatus::Ok, "there is room again");
        expected[at * CHUNK..][..CHUNK].copy_from_slice(&bytes);
    }
    assert!(read_all(&mut driver, 32 << 20) == expected);
    end(daemon);
    assert!(bench.content(disk.to_str().unwrap()) == expected);
    assert!(!bench.check(disk.to_str().unwrap()).0);
}

#[test]
fn read_only_images_are_left_alone() {
    let bench = Bench::new();
    bench.file("raw", &pattern(2, 1 << 20));
    bench.img("convert -c -f raw -O qcow2 raw disk");
    let before = fs::read(bench.path("disk")).unwrap();
    let daemon = bench.start("disk", &["--read-only"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_eq!(driver.write(0, &[1; 512]).unwrap(), IoStatus::IoErr);
    assert!(read_all(&mut driver, 1 << 20) == pattern(2, 1 << 20));
    end(daemon);
    assert!(fs::read(bench.path("disk")).unwrap() == before);
}

/// Blocks of 4 KiB, each with the number of its last write in every word.
const BLOCK: usize = 4096;

#[derive(Default)]
struct Block {
    completed: u64,
    in_flight: Option<u64>,
    /// A write that was not completed did half of it, and none has been since.
    torn: bool,
}

/// Random writes on both queues until so many have completed; then the daemon dies.
fn write_until_killed(
    driver: &mut BlockDriver,
    daemon: &mut Daemon,
    blocks: &mut [Block],
    sequence: &mut u64,
    after: usize,
) -> Result<(), DriverError> {
    const DEPTH: usize = 16;
    let places: Vec<u64> = (0..2 * DEPTH).map(|_| driver.ram.allocate(BLOCK as u64, BLOCK as u64)).collect();
    let mut free: [Vec<u64>; 2] = [places[..DEPTH].to_vec(), places[DEPTH..].to_vec()];
    let mut under_way: HashMap<(usize, u16), (usize, u64)> = HashMap::new();
    let mut completed = 0;
    while completed < after {
        for (queue, free) in free.iter_mut().enumerate() {
            while let Some(place) = free.pop() {
                *sequence += 1;
                let block = (sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as usize % blocks.len();
                if blocks[block].in_flight.is_some() {
                    free.push(place);
                    break;
                }
                driver.ram.write(place, &sequence.to_le_bytes().repeat(BLOCK / 8))?;
                let sector = (block * BLOCK / 512) as u64;
                let data = [Buffer::to_read(place, BLOCK as u32)];
                let head = driver.submit(queue, RequestKind::Out, sector, &data)?.unwrap();
                blocks[block].in_flight = Some(*sequence);
                under_way.insert((queue, head), (block, place));
            }
            driver.kick(queue)?;
        }
        completed += reap(driver, blocks, &mut under_way, &mut free)?;
        std::thread::yield_now();
    }
    daemon.signal(Signal::KILL)?;
    daemon.wait()?;
    // What it completed to the very end counts.
    while reap(driver, blocks, &mut under_way, &mut free)? > 0 {}
    Ok(())
}

fn reap(
    driver: &mut BlockDriver,
    blocks: &mut [Block],
    under_way: &mut HashMap<(usize, u16), (usize, u64)>,
    free: &mut [Vec<u64>; 2],
) -> Result<usize, DriverError> {
    let mut count = 0;
    for (queue, free) in free.iter_mut().enumerate() {
        while let Some((head, _)) = driver.queues[queue].pop_used(&driver.ram)? {
            assert_eq!(driver.status(queue, head)?, IoStatus::Ok);
            let (block, place) = under_way.remove(&(queue, head)).unwrap();
            blocks[block].completed = blocks[block].in_flight.take().unwrap();
            blocks[block].torn = false;
            free.push(place);
            count += 1;
        }
    }
    Ok(count)
}

#[test]
fn a_successor_finds_every_completed_write() {
    const BLOCKS: usize = 4096;
    for (create, cache) in [
        ("create -q -f qcow2 disk 16M", "writeback"),
        ("create -q -f qcow2 -o cluster_size=4k -b base -F raw disk 16M", "none"),
        ("create -q -f qcow2 -o cluster_size=512 disk 16M", "writeback"),
    ] {
        let bench = Bench::new();
        bench.file("base", &vec![0; 16 << 20]);
        bench.img(create);
        let mut blocks: Vec<Block> = (0..BLOCKS).map(|_| Block::default()).collect();
        let mut sequence = 0;
        for round in 0..8 {
            let mut daemon = bench.start("disk", &["--cache", cache, "--num-queues", "2"]);
            let mut driver = BlockDriver::connect(&daemon.socket, 2).unwrap();
            let found = read_all(&mut driver, BLOCKS * BLOCK);
            for (at, (block, bytes)) in blocks.iter_mut().zip(found.chunks(BLOCK)).enumerate() {
                let words = bytes.as_chunks::<8>().0;
                let got = u64::from_le_bytes(words[0]);
                let good = got == block.completed || Some(got) == block.in_flight;
                assert!(
                    good,
                    "{create}, round {round}: block {at} has {got}, completed was {}",
                    block.completed
                );
                let whole = words.iter().all(|word| *word == words[0]);
                block.torn |= block.in_flight.is_some();
                assert!(whole || block.torn, "{create}: block {at} is torn");
                block.completed = got;
                block.in_flight = None;
            }
            let after = 100 + round * 171;
            write_until_killed(&mut driver, &mut daemon, &mut blocks, &mut sequence, after).unwrap();
            drop(daemon);
            let (errors, _leaks) = bench.check("disk");
            assert!(!errors, "{create}, round {round}");
        }
    }
}

fn refused(bench: &Bench, image: &str, words: &[&str]) {
    let mut command = std::process::Command::new(cleave_tests::driver::binary("cleave-block").unwrap());
    command.args(["--format", "qcow2", "--socket-path"]).arg(bench.path("socket")).arg("--blk-file");
    let output = command.arg(bench.path(image)).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{image}: {said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    for word in words {
        assert!(said.contains(word), "'{word}' is not in: {said}");
    }
}

fn patch(path: &Path, at: usize, bytes: &[u8]) {
    let mut content = fs::read(path).unwrap();
    content[at..at + bytes.len()].copy_from_slice(bytes);
    fs::write(path, content).unwrap();
}

#[test]
fn what_cannot_be_served_is_refused_in_one_line() {
    let bench = Bench::new();
    bench.file("raw", &[0; 65536]);
    refused(&bench, "raw", &["is no qcow2 image", "format raw"]);
    refused(&bench, "nothing", &["cannot open disk"]);
    for (options, word) in [
        ("-o extended_l2=on,cluster_size=64k", "extended_l2=off"),
        ("-o compression_type=zstd", "compression_type=zlib"),
        ("-o data_file=data", "data_file"),
    ] {
        bench.img(&format!("create -q -f qcow2 {options} disk 1M"));
        refused(&bench, "disk", &[word, "qemu-img convert"]);
    }
    bench.img("create -q -f qcow2 disk 1M");
    let disk = bench.path("disk");
    for (bit, words) in [(1u8, ["dirty", "qemu-img check -r all"]), (2, ["corrupt", "qemu-img check -r all"])]
    {
        patch(&disk, 79, &[bit]);
        refused(&bench, "disk", &words);
    }
    patch(&disk, 79, &[0]);
    patch(&disk, 35, &[1]);
    refused(&bench, "disk", &["encrypted"]);
    bench.img("create -q -f qcow2 nothing 0");
    refused(&bench, "nothing", &["qcow2 of the size 0", "qemu-img resize"]);
    bench.file("empty", b"");
    refused(&bench, "empty", &["is an empty file", "qemu-img create -f qcow2"]);
}

#[test]
fn backing_files_that_cannot_be_used_are_named() {
    let bench = Bench::new();
    bench.file("base", &[0; 65536]);
    bench.img("create -q -f qcow2 -u -b missing -F raw disk 1M");
    refused(&bench, "disk", &["needs its backing file", "missing", "qemu-img rebase -u -b PATH -F FORMAT"]);
    bench.img("create -q -f qcow2 -u -b nbd:localhost:10809 -F raw disk 1M");
    refused(&bench, "disk", &["nbd:localhost:10809", "qemu-img rebase"]);
    bench.img("create -q -f qcow2 -u -b base -F raw disk 1M");
    // The mark of the extension with the format, and the format itself, become an extension nobody knows.
    let content = fs::read(bench.path("disk")).unwrap();
    let at = content.windows(4).position(|word| word == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    patch(&bench.path("disk"), at, &[0x12, 0x34, 0x56, 0x78]);
    refused(
        &bench,
        "disk",
        &["what format its backing file 'base' has", "qemu-img rebase -u -b base -F raw"],
    );
    bench.img("create -q -f qcow2 -u -b other -F qcow2 disk 1M");
    bench.img("create -q -f qcow2 -u -b disk -F qcow2 other 1M");
    refused(&bench, "disk", &["leads back"]);
}

/// Sizes in a header are what somebody wrote there: they cost no more memory than the largest image that can be served.
#[test]
fn a_header_at_its_limits_costs_bounded_memory() {
    let bench = Bench::new();
    bench.img("create -q -f qcow2 disk 64M");
    bench.io("disk", "write 1M 64k");
    let valid = fs::read(bench.path("disk")).unwrap();
    let (mut served, mut refused) = (0, 0);
    for at in (4..112).step_by(4) {
        for word in [[0xff; 4], [0x7f, 0xff, 0xff, 0xff], [0, 0xff, 0xff, 0xff], [0, 0, 0x10, 0]] {
            let mut bytes = valid.clone();
            bytes[at..at + 4].copy_from_slice(&word);
            bench.file("patched", &bytes);
            // Without a frontend: it opens the image, says what is wrong, or ends because nobody is there.
            let (ours, theirs) = UnixStream::pair().unwrap();
            drop(ours);
            let mut command = Command::new("prlimit");
            command.arg("--data=268435456").arg(binary("cleave-block").unwrap());
            command.args(["--format", "qcow2", "--fd", "3", "--blk-file"]).arg(bench.path("patched"));
            command.fd_mappings(vec![FdMapping { parent_fd: theirs.into(), child_fd: 3 }]).unwrap();
            let output = command.output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            match output.status.code() {
                Some(0) => served += 1,
                Some(2) if said.trim_end().lines().count() == 1 => refused += 1,
                _ => panic!("{word:x?} at {at}: {}: {said}", output.status),
            }
        }
    }
    assert!(served > 10 && refused > 40, "{served} served, {refused} refused");
}
