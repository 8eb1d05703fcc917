//! What a process leaves behind that dies at any moment.

use std::os::unix::fs::FileExt;
use std::rc::Rc;

use super::*;
use crate::qcow2::check;
use crate::qcow2::header::Header;

/// The file as it is now, as a successor would find it, has nothing worse than leaks.
fn soundness(file: &File) -> Result<(), HeaderError> {
    let len = file.metadata().unwrap().len();
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let header = Header::parse(&bytes, len)?;
    check::tables(file, &header, len, true)
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Write { sector: u64, sectors: usize },
    Zero { sector: u64, sectors: u64 },
    Discard { sector: u64, sectors: u64 },
    Flush,
}

const SECTORS: u64 = 4096;

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..SECTORS - 64, 1..64usize).prop_map(|(sector, sectors)| Op::Write { sector, sectors }),
        1 => (0..SECTORS - 64, 1..64u64).prop_map(|(sector, sectors)| Op::Zero { sector, sectors }),
        1 => (0..SECTORS - 64, 1..64u64).prop_map(|(sector, sectors)| Op::Discard { sector, sectors }),
        2 => Just(Op::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]

    /// After every single write to the file, its tables are sound: small clusters make new tables frequent.
    #[test]
    fn every_write_leaves_sound_tables(
        ops in prop::collection::vec(op(), 1..40),
        refcount_bits in prop::sample::select(vec![1usize, 2, 8, 16, 64]),
    ) {
        let place = directory();
        let path = place.path().join("image");
        New { refcount_bits, ..New::of(SECTORS * 512, 512) }.make(&path);
        let chain = chain::open(&path, false, CacheMode::Writeback).unwrap();
        let worst = Rc::new(RefCell::new(Ok(())));
        let note = worst.clone();
        OBSERVER.set(Some(Box::new(move |file| {
            let now = soundness(file);
            let mut worst = note.borrow_mut();
            if worst.is_ok() {
                *worst = now;
            }
        })));
        let mut expected = vec![0; (SECTORS * 512) as usize];
        for (seed, op) in ops.into_iter().enumerate() {
            match op {
                Op::Write { sector, sectors } => {
                    let bytes = pattern(seed as u64, sectors * 512);
                    chain.access.write(&bytes, sector * 512).unwrap();
                    let at = (sector * 512) as usize;
                    expected[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                Op::Zero { sector, sectors } => {
                    chain.access.write_zeroes(sector * 512, sectors * 512).unwrap();
                    expected[(sector * 512) as usize..((sector + sectors) * 512) as usize].fill(0);
                }
                Op::Discard { sector, sectors } => {
                    // SAFETY: nobody else has the image.
                    unsafe { chain.access.discard_to_zero_unsafe(sector * 512, sectors * 512) }.unwrap();
                    expected[(sector * 512) as usize..((sector + sectors) * 512) as usize].fill(0);
                }
                Op::Flush => chain.access.flush().unwrap(),
            }
        }
        let mut found = vec![1; expected.len()];
        chain.access.read(&mut found, 0).unwrap();
        drop(chain);
        OBSERVER.set(None);
        prop_assert!(found == expected);
        prop_assert!(worst.borrow().is_ok(), "{worst:?}");
    }

    /// A write whose event is out is in the file: a copy made at that moment has it.
    #[test]
    fn a_completed_write_is_in_the_file(
        writes in prop::collection::vec((0..SECTORS - 64, 1..64usize), 1..24),
        cluster in prop::sample::select(vec![512usize, 4096, 65536]),
    ) {
        let place = directory();
        let (path, copy) = (place.path().join("image"), place.path().join("copy"));
        New::of(SECTORS * 512, cluster).make(&path);
        let mut engine = Engine::new(Arc::new(open_image(&path, CacheMode::Writeback).unwrap()), 8).unwrap();
        let mut expected = vec![0; (SECTORS * 512) as usize];
        for (seed, (sector, sectors)) in writes.into_iter().enumerate() {
            let bytes = pattern(seed as u64, sectors * 512);
            write(&mut engine, sector * 512, &bytes, false).unwrap();
            let at = (sector * 512) as usize;
            expected[at..at + bytes.len()].copy_from_slice(&bytes);
            std::fs::copy(&path, &copy).unwrap();
            prop_assert!(all(&copy, CacheMode::Writeback) == expected, "after write {seed}");
        }
    }
}
