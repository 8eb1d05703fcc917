#![expect(unsafe_code, reason = "requests name memory")]

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::thread;

use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::engine::tests::{done, iovec};
use crate::image::{Image, ImageFormat, ImageOptions};
use crate::{Engine, Range, RangeOp, Transfer};

mod corrupt;
mod crash;

const CACHES: [CacheMode; 3] = [CacheMode::None, CacheMode::Writeback, CacheMode::Writethrough];

/// The worst that was found of a file, by inode.
type Worst = Arc<Mutex<Result<(), HeaderError>>>;

static OBSERVED: Mutex<Vec<(u64, Worst)>> = Mutex::new(Vec::new());

/// Called after each write of imago's to a file.
pub(super) fn after_write(file: &File) {
    let inode = file.metadata().unwrap().ino();
    let worst = lock(&OBSERVED).iter().find(|(other, _)| *other == inode).map(|(_, worst)| worst.clone());
    if let Some(worst) = worst {
        let now = crash::soundness(file);
        let mut worst = lock(&worst);
        if worst.is_ok() {
            *worst = now;
        }
    }
}

fn directory() -> TempDir {
    // Beside the build: a tmpfs would have no O_DIRECT on older kernels.
    tempfile::TempDir::new_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target")).unwrap()
}

/// How to make an image.
#[derive(Debug, Clone)]
struct New {
    size: u64,
    cluster: usize,
    refcount_bits: usize,
    backing: Option<(&'static str, &'static str)>,
}

impl New {
    fn of(size: u64, cluster: usize) -> Self {
        Self { size, cluster, refcount_bits: 16, backing: None }
    }

    fn make(&self, path: &Path) {
        let _ = std::fs::remove_file(path);
        let storage = imago::file::File::create_open(StorageCreateOptions::new().filename(path)).unwrap();
        let builder = Qcow2::<imago::file::File>::create_builder(storage)
            .size(self.size)
            .cluster_size(self.cluster)
            .refcount_width(self.refcount_bits);
        let builder = match self.backing {
            Some((name, format)) => builder.backing(name.to_owned(), format.to_owned()),
            None => builder,
        };
        builder.create().unwrap();
    }
}

fn open_image(path: &Path, cache: CacheMode) -> Result<Image, ImageError> {
    Image::open(&ImageOptions { path: path.to_owned(), format: ImageFormat::Qcow2, read_only: false, cache })
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(next).collect()
}

fn write(engine: &mut Engine, offset: u64, bytes: &[u8], durable: bool) -> io::Result<()> {
    let mut bytes = bytes.to_vec();
    let middle = bytes.len() / 3;
    let (a, b) = bytes.split_at_mut(middle);
    // SAFETY: the memory outlives this call, which ends with the event.
    unsafe { engine.transfer(1, Transfer::write(offset, durable), [iovec(a), iovec(b)]) };
    done(engine).1
}

fn read(engine: &mut Engine, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0xee; len + 1];
    let (a, b) = bytes[..len].split_at_mut(len / 5);
    // SAFETY: as for a write.
    unsafe { engine.transfer(2, Transfer::read(offset), [iovec(a), iovec(b)]) };
    let result = done(engine).1;
    assert_eq!(bytes.pop(), Some(0xee));
    result.map(|()| bytes)
}

fn range(engine: &mut Engine, op: RangeOp, offset: u64, len: u64) -> io::Result<()> {
    engine.park_ranges(3, op, vec![Range { offset, len }]);
    engine.submit(3);
    done(engine).1
}

fn all(path: &Path, cache: CacheMode) -> Vec<u8> {
    let image = Arc::new(open_image(path, cache).unwrap());
    let len = image.len() as usize;
    read(&mut Engine::new(image, 4).unwrap(), 0, len).unwrap()
}

#[test]
fn an_empty_disk_reads_as_zeros_and_keeps_what_is_written() {
    const SIZE: usize = 3 << 20;
    for (cache, cluster) in
        CACHES.into_iter().flat_map(|cache| [4096, 65536, 2 << 20].map(|cluster| (cache, cluster)))
    {
        let place = directory();
        let path = place.path().join("image");
        New::of(SIZE as u64, cluster).make(&path);
        let mut expected = vec![0; SIZE];
        let image = Arc::new(open_image(&path, cache).unwrap());
        assert_eq!(image.len(), SIZE as u64);
        let mut engine = Engine::new(image, 8).unwrap();
        assert!(read(&mut engine, 0, SIZE).unwrap() == expected);
        for (round, (offset, len)) in
            [(0, 4096), (8192, 512 << 10), (1 << 20, 4096), (4096, 1 << 20), (SIZE - 8192, 8192)]
                .into_iter()
                .enumerate()
        {
            let bytes = pattern(round as u64, len);
            write(&mut engine, offset as u64, &bytes, round % 2 == 1).unwrap();
            expected[offset..offset + len].copy_from_slice(&bytes);
            assert!(read(&mut engine, 0, SIZE).unwrap() == expected, "{cache:?} {cluster} {round}");
        }
        engine.flush(0);
        done(&mut engine).1.unwrap();
        drop(engine);
        assert!(all(&path, cache) == expected, "{cache:?} {cluster}: other bytes on the second look");
    }
}

#[test]
fn writes_that_are_synced_after_leave_no_aligned_memory_behind() {
    const CLUSTER: usize = 64 << 10;
    const CLUSTERS: usize = 80;
    let place = directory();
    let path = place.path().join("image");
    New::of((CLUSTERS * CLUSTER) as u64, CLUSTER).make(&path);
    let mut engine = Engine::new(Arc::new(open_image(&path, CacheMode::None).unwrap()), 8).unwrap();
    for at in (0..CLUSTERS).map(|n| (n * CLUSTER) as u64) {
        // Its tables are not durable after this one.
        write(&mut engine, at, &[1; CLUSTER], false).unwrap();
        write(&mut engine, at, &[2; CLUSTER], true).unwrap();
        assert!(engine.has_room(), "no request is welcome any more after {at} bytes");
    }
}

#[test]
fn backing_files_show_until_they_are_written_over() {
    const SIZE: usize = 1 << 20;
    for cache in CACHES {
        let place = directory();
        // Not a whole number of clusters, nor of blocks, and shorter than what stands before it.
        let raw = pattern(1, 300_000);
        std::fs::write(place.path().join("base"), &raw).unwrap();
        New { backing: Some(("base", "raw")), ..New::of(600 << 10, 65536) }
            .make(&place.path().join("middle"));
        New { backing: Some(("middle", "qcow2")), ..New::of(SIZE as u64, 4096) }
            .make(&place.path().join("top"));
        let mut expected = vec![0; SIZE];
        expected[..raw.len()].copy_from_slice(&raw);

        let path = place.path().join("top");
        assert!(all(&path, cache) == expected, "{cache:?}");
        let mut engine = Engine::new(Arc::new(open_image(&path, cache).unwrap()), 8).unwrap();
        for (seed, (offset, len)) in
            [(8192, 4096), (299_008, 4096), (65536 - 4096, 16384)].into_iter().enumerate()
        {
            let bytes = pattern(seed as u64, len);
            write(&mut engine, offset as u64, &bytes, false).unwrap();
            expected[offset..offset + len].copy_from_slice(&bytes);
        }
        assert!(read(&mut engine, 0, SIZE).unwrap() == expected, "{cache:?}");
        drop(engine);
        assert!(all(&path, cache) == expected, "{cache:?}");
        assert!(std::fs::read(place.path().join("base")).unwrap() == raw);
    }
}

#[test]
fn chains_that_cannot_be_used_are_refused() {
    let place = directory();
    let at = |name: &str| place.path().join(name);
    let refusal = |backing: (&'static str, &'static str)| {
        New { backing: Some(backing), ..New::of(1 << 20, 65536) }.make(&at("image"));
        open_image(&at("image"), CacheMode::Writeback).unwrap_err()
    };
    assert!(matches!(refusal(("json:{}", "raw")), ImageError::BackingName { .. }));
    assert!(matches!(refusal(("nbd://x/y", "raw")), ImageError::BackingName { .. }));
    assert!(matches!(refusal(("x", "vmdk")), ImageError::BackingFormatUnknown { .. }));
    let missing = refusal(("nothing", "raw"));
    assert!(
        matches!(&missing, ImageError::BackingMissing { image, .. } if *image == at("image")),
        "{missing:?}"
    );
    assert!(!missing.is_hosts_fault());
    assert!(matches!(refusal(("image", "qcow2")), ImageError::BackingLoop { .. }));
    New { backing: Some(("image", "qcow2")), ..New::of(1 << 20, 65536) }.make(&at("other"));
    assert!(matches!(refusal(("other", "qcow2")), ImageError::BackingLoop { .. }));
    assert!(matches!(refusal((".", "raw")), ImageError::Backing { .. }));

    let names: Vec<&'static str> = (0..70).map(|n| &*format!("link{n}").leak()).collect();
    New::of(1 << 20, 65536).make(&at(names[0]));
    for pair in names.windows(2) {
        New { backing: Some((pair[0], "qcow2")), ..New::of(1 << 20, 65536) }.make(&at(pair[1]));
    }
    assert!(open_image(&at(names[64]), CacheMode::Writeback).is_ok());
    let deep = open_image(&at(names[65]), CacheMode::Writeback).unwrap_err();
    assert!(matches!(deep, ImageError::BackingDepth { most: 64, .. }), "{deep}");
    let small = at("small");
    New::of(1 << 20, 512).make(&small);
    assert!(matches!(open_image(&small, CacheMode::None), Err(ImageError::Clusters { cluster: 512, .. })));
    assert!(open_image(&small, CacheMode::Writeback).is_ok());
}

#[test]
fn a_backing_file_is_shared_and_an_image_is_not() {
    let place = directory();
    let at = |name: &str| place.path().join(name);
    New::of(1 << 20, 65536).make(&at("base"));
    for name in ["a", "b"] {
        New { backing: Some(("base", "qcow2")), ..New::of(1 << 20, 65536) }.make(&at(name));
    }
    let _a = open_image(&at("a"), CacheMode::Writeback).unwrap();
    let _b = open_image(&at("b"), CacheMode::Writeback).unwrap();
    assert!(matches!(open_image(&at("a"), CacheMode::Writeback), Err(ImageError::Locked { .. })));
    assert!(matches!(open_image(&at("base"), CacheMode::Writeback), Err(ImageError::Locked { .. })));
}

/// Each thread has its own sectors, but they share clusters: what one allocates, the other writes in place at once.
#[test]
fn queues_that_write_to_the_same_clusters_do_not_lose_anything() {
    const BLOCK: usize = 4096;
    const BLOCKS: usize = 512;
    for cache in [CacheMode::None, CacheMode::Writeback] {
        let place = directory();
        let path = place.path().join("image");
        std::fs::write(place.path().join("base"), vec![0x77; 1 << 20]).unwrap();
        New { backing: Some(("base", "raw")), ..New::of((BLOCK * BLOCKS) as u64, 65536) }.make(&path);
        let image = Arc::new(open_image(&path, cache).unwrap());
        thread::scope(|scope| {
            for thread in 0..4 {
                let image = image.clone();
                scope.spawn(move || write_own_blocks(&mut Engine::new(image, 32).unwrap(), thread));
            }
        });
        drop(image);
        let found = all(&path, cache);
        for (block, bytes) in found.chunks(BLOCK).enumerate() {
            let expected = pattern((block + 3 * BLOCKS) as u64, BLOCK);
            assert!(bytes == expected, "{cache:?}: block {block}");
        }
    }

    /// Every fourth block, four times over, eight requests in flight.
    fn write_own_blocks(engine: &mut Engine, thread: usize) {
        for round in 0..4 {
            let order: Vec<usize> = (0..BLOCKS / 4).map(|n| (n * 37 % (BLOCKS / 4)) * 4 + thread).collect();
            for blocks in order.chunks(8) {
                let mut memory: Vec<Vec<u8>> =
                    blocks.iter().map(|block| pattern((block + round * BLOCKS) as u64, BLOCK)).collect();
                for (tag, (block, bytes)) in blocks.iter().zip(&mut memory).enumerate() {
                    let transfer = Transfer::write((block * BLOCK) as u64, false);
                    // SAFETY: `memory` lives until all events have come.
                    unsafe { engine.transfer(tag as u16, transfer, [iovec(bytes)]) };
                }
                while engine.in_flight() > 0 {
                    done(engine).1.unwrap();
                }
                for (block, bytes) in blocks.iter().zip(&memory) {
                    assert!(read(engine, (block * BLOCK) as u64, BLOCK).unwrap() == *bytes);
                }
            }
        }
    }
}
