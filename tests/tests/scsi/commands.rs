//! Commands reach the images, and their answers the driver.

use cleave_tests::driver::{Command, lun};

use super::common::{MIB, disk, pattern};
use super::{BLOCK, CD_BLOCK, CDROM, DISK, TEST_UNIT_READY, driver, is_there, sense_of, start, start_both};

#[test]
fn a_new_driver_hears_of_power_and_then_reads_and_writes() {
    let (image, iso) = (disk(4 * MIB), disk(MIB));
    let scsi = start_both(&image, &iso, &[]);
    let mut driver = driver(&scsi, 1);
    assert_eq!(sense_of(&mut driver, DISK, &TEST_UNIT_READY), Some((6, 0x29, 0)));
    assert_eq!(sense_of(&mut driver, DISK, &TEST_UNIT_READY), None);

    let read = driver.read(DISK, 8, 16, BLOCK).unwrap();
    assert!(read.is_good(), "{read:?}");
    assert_eq!(read.data, pattern(0, 4 * MIB as usize)[8 * 512..24 * 512]);
    assert_eq!((read.residual, read.written), (0, 108 + 16 * 512));

    let data = pattern(5, 64 * 512);
    assert!(driver.write(DISK, 100, &data, BLOCK).unwrap().is_good());
    assert_eq!(driver.read(DISK, 100, 64, BLOCK).unwrap().data, data);
    let flush = driver.run(&Command::new(DISK, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0])).unwrap();
    assert!(flush.is_good());
    assert_eq!(std::fs::read(image.path()).unwrap()[100 * 512..164 * 512], data);

    let read = driver.read(CDROM, 3, 4, CD_BLOCK).unwrap();
    assert_eq!(read.data, pattern(0, MIB as usize)[3 * 2048..7 * 2048]);
}

#[test]
fn what_is_not_there_is_said_to_be_so() {
    let (image, iso) = (disk(MIB), disk(MIB));
    let scsi = start_both(&image, &iso, &[]);
    let mut driver = driver(&scsi, 1);
    let ready = |lun| Command::new(lun, &TEST_UNIT_READY);
    assert_eq!(driver.run(&ready(lun(5, 0))).unwrap().response, 3, "BAD_TARGET");
    assert_eq!(driver.run(&ready([9; 8])).unwrap().response, 3, "BAD_TARGET");
    assert_eq!(sense_of(&mut driver, lun(0, 9), &TEST_UNIT_READY), Some((5, 0x25, 0)));
    assert!(is_there(&mut driver, 1) && is_there(&mut driver, 2) && !is_there(&mut driver, 3));

    // Past the end, write protected, unknown, too short a buffer.
    assert!(driver.run(&ready(DISK)).unwrap().is_good() && driver.run(&ready(CDROM)).unwrap().is_good());
    let past = driver.read(DISK, 2047, 2, BLOCK).unwrap();
    assert_eq!((past.status, past.sense_code()), (2, Some((5, 0x21, 0))));
    assert_eq!(past.residual, 1024);
    let write = driver.write(CDROM, 0, &[0; 2048], CD_BLOCK).unwrap();
    assert_eq!(write.sense_code().map(|(key, ..)| key), Some(5), "{write:?}");
    assert_eq!(sense_of(&mut driver, DISK, &[0xc7, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Some((5, 0x20, 0)));
    let cdb = [0x28, 0, 0, 0, 0, 0, 0, 0, 4, 0];
    let overrun = driver.run(&Command { data_in: 512, ..Command::new(DISK, &cdb) }).unwrap();
    assert_eq!(overrun.response, 1, "OVERRUN");
}

/// Commands for which the engine has no word.
#[test]
fn what_goes_through_our_own_memory_is_right() {
    let (image, iso) = (disk(4 * MIB), disk(MIB));
    for cache in ["writeback", "none"] {
        let spec = format!("disk={},lun=1,cache={cache}", image.path().display());
        let scsi = start(&["--lun", &spec, "--cdrom", super::path(&iso)]);
        let mut driver = driver(&scsi, 1);
        let content = pattern(7, 600 * 512);
        assert!(driver.write(DISK, 0, &content, BLOCK).unwrap().is_good());

        // VERIFY: readable, equal, different.
        let verify = |byte1: u8, blocks: [u8; 2]| [0x2f, byte1, 0, 0, 0, 0, 0, blocks[0], blocks[1], 0];
        assert!(driver.run(&Command::new(DISK, &verify(0, [2, 88]))).unwrap().is_good());
        let compare = verify(2, [2, 88]);
        assert!(
            driver.run(&Command { data_out: &content, ..Command::new(DISK, &compare) }).unwrap().is_good()
        );
        let mut other = content.clone();
        other[300_001] ^= 1;
        let answer = driver.run(&Command { data_out: &other, ..Command::new(DISK, &compare) }).unwrap();
        assert_eq!(answer.sense_code(), Some((0xe, 0x1d, 0)));
        assert_eq!(answer.sense[3..7], 300_001u32.to_be_bytes());

        // WRITE SAME of a pattern, then of zeroes.
        let block = pattern(9, 512);
        let same = [0x41, 0, 0, 0, 0, 10, 0, 2, 0, 0];
        assert!(driver.run(&Command { data_out: &block, ..Command::new(DISK, &same) }).unwrap().is_good());
        let read = driver.read(DISK, 9, 514, BLOCK).unwrap().data;
        assert_eq!(read[..512], content[9 * 512..10 * 512]);
        assert!(read[512..513 * 512].chunks(512).all(|chunk| chunk == block));
        assert_eq!(read[513 * 512..], content[522 * 512..523 * 512]);
        let zeroes = Command { data_out: &[0; 512], ..Command::new(DISK, &same) };
        assert!(driver.run(&zeroes).unwrap().is_good());
        assert!(driver.read(DISK, 10, 512, BLOCK).unwrap().data.iter().all(|byte| *byte == 0));

        // COMPARE AND WRITE: once it is as expected, once it is not.
        let mut swap = content[..1024].to_vec();
        let new = pattern(11, 1024);
        swap.extend(&new);
        let cdb = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0];
        let command = Command { data_out: &swap, ..Command::new(DISK, &cdb) };
        assert!(driver.run(&command).unwrap().is_good());
        assert_eq!(driver.read(DISK, 0, 2, BLOCK).unwrap().data, new);
        let again = driver.run(&command).unwrap();
        assert_eq!(again.sense_code(), Some((0xe, 0x1d, 0)));
        assert_eq!(driver.read(DISK, 0, 2, BLOCK).unwrap().data, new);

        // UNMAP of two pieces.
        let mut list = vec![0, 38, 0, 32, 0, 0, 0, 0];
        for (lba, blocks) in [(2000u64, 8u32), (3000, 16)] {
            list.extend(lba.to_be_bytes());
            list.extend(blocks.to_be_bytes());
            list.extend([0; 4]);
        }
        let unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0];
        assert!(driver.run(&Command { data_out: &list, ..Command::new(DISK, &unmap) }).unwrap().is_good());
        let read = driver.read(DISK, 1999, 10, BLOCK).unwrap().data;
        assert!(read[512..9 * 512].iter().all(|byte| *byte == 0));
        assert!(read[..512].iter().any(|byte| *byte != 0));
        // READ with FUA.
        let fua = [0x28, 8, 0, 0, 0, 0, 0, 0, 2, 0];
        let read = driver.run(&Command { data_in: 1024, ..Command::new(DISK, &fua) }).unwrap();
        assert_eq!(read.data, new);
    }
}

#[test]
fn many_queues_serve_many_units_at_once() {
    let images: Vec<_> = (0..4).map(|_| disk(MIB)).collect();
    let specs: Vec<String> = images
        .iter()
        .enumerate()
        .map(|(at, image)| {
            format!("disk={},target={},lun=0,cache=none", image.path().display(), at % 2 * 3 + at / 2)
        })
        .collect();
    let args: Vec<&str> =
        specs.iter().flat_map(|spec| ["--lun", spec]).chain(["--num-queues", "3"]).collect();
    let scsi = start(&args);
    let mut driver = driver(&scsi, 3);
    let content = pattern(0, MIB as usize);
    for target in [0, 1, 3, 4] {
        assert!(driver.read(lun(target, 0), 0, 1, BLOCK).unwrap().is_good());
    }
    for round in 0..50u32 {
        let mut heads = Vec::new();
        for (queue, target) in [(0, 0), (1, 1), (2, 3), (0, 4), (1, 0), (2, 1)] {
            let block = (round * 31) as u8;
            let cdb = [0x28, 0, 0, 0, 0, block, 0, 0, 8, 0];
            let command = Command { data_in: 4096, ..Command::new(lun(target, 0), &cdb) };
            // Each head has a data area of its own, whatever its queue, in turn.
            if heads.iter().all(|(other, _)| *other != queue) {
                heads.push((queue, driver.submit(queue, &command).unwrap()));
                let (head, answer) = driver.answer(queue).unwrap();
                assert_eq!(Some(&(queue, head)), heads.last());
                assert!(answer.is_good());
                let at = usize::from(block) * 512;
                assert_eq!(answer.data, content[at..at + 4096]);
            }
        }
    }
}

/// The last unit's rate limit, a qcow2 image and one on a read-only file are served by the same engines as cleave-block's.
#[test]
fn a_read_only_disk_is_write_protected() {
    let image = disk(MIB);
    let scsi = start(&["--lun", &format!("disk={},lun=1,readonly=on", image.path().display())]);
    let mut driver = driver(&scsi, 1);
    assert!(driver.read(DISK, 0, 1, BLOCK).unwrap().is_good());
    let write = driver.write(DISK, 0, &[1; 512], BLOCK).unwrap();
    assert_eq!(write.sense_code(), Some((7, 0x27, 0)));
}
