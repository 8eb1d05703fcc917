//! What a process leaves behind that dies at any moment.

use std::os::unix::fs::FileExt;

use super::*;
use crate::qcow2::check;
use crate::qcow2::header::Header;

/// The file as it is now, as a successor would find it, has nothing worse than leaks.
pub(super) fn soundness(file: &File) -> Result<(), HeaderError> {
    let len = file.metadata().unwrap().len();
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let header = Header::parse(&bytes, len)?;
    check::tables(file, &header, len, true)
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Write { sector: u64, sectors: usize },
    Zero { sector: u64, sectors: u64, unmap: bool },
    Discard { sector: u64, sectors: u64 },
}

const SECTORS: u64 = 4096;

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..SECTORS - 64, 1..64usize).prop_map(|(sector, sectors)| Op::Write { sector, sectors }),
        1 => (0..SECTORS - 64, 1..64u64, any::<bool>())
            .prop_map(|(sector, sectors, unmap)| Op::Zero { sector, sectors, unmap }),
        1 => (0..SECTORS - 64, 1..64u64).prop_map(|(sector, sectors)| Op::Discard { sector, sectors }),
    ]
}

fn bytes_of(sector: u64, sectors: u64) -> std::ops::Range<usize> {
    (sector * 512) as usize..((sector + sectors) * 512) as usize
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]

    /// After every single write to the file, its tables are sound: small clusters make new tables frequent. And
    /// whatever is completed is in the file: a copy made at that moment has it.
    #[test]
    fn every_write_leaves_sound_tables(
        ops in prop::collection::vec(op(), 1..40),
        refcount_bits in prop::sample::select(vec![1usize, 2, 8, 16, 64]),
        cluster in prop::sample::select(vec![512usize, 512, 4096, 65536]),
    ) {
        let place = directory();
        let (path, copy) = (place.path().join("image"), place.path().join("copy"));
        New { refcount_bits, ..New::of(SECTORS * 512, cluster) }.make(&path);
        let inode = std::fs::metadata(&path).unwrap().ino();
        let worst = Worst::new(Mutex::new(Ok(())));
        lock(&OBSERVED).push((inode, worst.clone()));
        let mut engine = Engine::new(Arc::new(open_image(&path, CacheMode::Writeback).unwrap()), 8).unwrap();
        let mut expected = vec![0; (SECTORS * 512) as usize];
        for (seed, op) in ops.into_iter().enumerate() {
            match op {
                Op::Write { sector, sectors } => {
                    let bytes = pattern(seed as u64, sectors * 512);
                    write(&mut engine, sector * 512, &bytes, false).unwrap();
                    expected[bytes_of(sector, sectors as u64)].copy_from_slice(&bytes);
                }
                Op::Zero { sector, sectors, unmap } => {
                    let op = RangeOp::WriteZeroes { unmap, durable: false };
                    range(&mut engine, op, sector * 512, sectors * 512).unwrap();
                    expected[bytes_of(sector, sectors)].fill(0);
                }
                Op::Discard { sector, sectors } => {
                    range(&mut engine, RangeOp::Discard, sector * 512, sectors * 512).unwrap();
                    let at = bytes_of(sector, sectors);
                    expected[at.clone()].copy_from_slice(&read(&mut engine, sector * 512, at.len()).unwrap());
                }
            }
            if seed % 4 == 0 {
                std::fs::copy(&path, &copy).unwrap();
                prop_assert!(all(&copy, CacheMode::Writeback) == expected, "after {op:?}");
            }
        }
        let found = read(&mut engine, 0, expected.len()).unwrap();
        drop(engine);
        lock(&OBSERVED).retain(|(other, _)| *other != inode);
        prop_assert!(found == expected);
        prop_assert!(all(&path, CacheMode::Writeback) == expected);
        prop_assert!(lock(&worst).is_ok(), "{worst:?}");
    }
}
