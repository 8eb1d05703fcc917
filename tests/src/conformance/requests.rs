//! What each request does (virtio 1.2, 5.2.6).

use cleave_common::vhost_user::features::virtio;

use super::{Check, End, MIB, Outcome, Subject, demand, demand_status, feature, needs, pattern};
use crate::driver::{BlockDriver, Buffer, IoStatus, RequestKind};

pub(super) const CHECKS: &[Check] = &[
    Check { name: "read", demand: "a read fills its buffers, and says how much was written", run: read },
    Check { name: "write", demand: "what is written is read", run: write },
    Check { name: "scattered", demand: "requests in many buffers of odd sizes, misaligned", run: scattered },
    Check { name: "direct-chains", demand: "chains without an indirect table", run: direct_chains },
    Check { name: "indirect-chains", demand: "chains in an indirect table", run: indirect_chains },
    Check { name: "flush", demand: "FLUSH succeeds where it is offered", run: flush },
    Check { name: "out-of-range", demand: "beyond the last sector there is IOERR", run: out_of_range },
    Check { name: "unsupported", demand: "a type that no device knows is UNSUPP", run: unsupported },
    Check { name: "read-only", demand: "a read-only disk refuses writes with IOERR", run: read_only },
    Check {
        name: "write-cache",
        demand: "the driver's switch of the write cache reads back",
        run: write_cache,
    },
    Check { name: "discard", demand: "DISCARD succeeds where it is offered", run: discard },
    Check { name: "write-zeroes", demand: "WRITE_ZEROES leaves zeros", run: write_zeroes },
];

fn read(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    let data = driver.data;
    driver.ram.write(data, &[0xee; 4096])?;
    let (status, written) = driver.request(RequestKind::In, 0, &[Buffer::to_write(data, 4096)])?;
    demand_status("a read", status, IoStatus::Ok)?;
    demand(written == 4097, || format!("{written} bytes are said to be written, 4097 are"))?;
    let first = driver.ram.read(data, 4096)?;
    let again = driver.read(0, 4096)?.1;
    demand(first == again, || "two reads of the same sectors differ".into())
}

fn write(subject: &Subject) -> Outcome {
    let mut driver = subject.writer()?;
    let end = driver.config()?.sectors;
    for (sector, len) in [(0, 512), (1, 4096), (77, 65536), (end - 8, 4096)] {
        let bytes = pattern(sector, len);
        demand_status("a write", driver.write(sector, &bytes)?, IoStatus::Ok)?;
        let (status, got) = driver.read(sector, len as u32)?;
        demand_status("a read", status, IoStatus::Ok)?;
        demand(got == bytes, || format!("{len} bytes written at sector {sector} are not read back"))?;
    }
    Ok(())
}

/// Writes `cut` pieces, misaligned by `shift`, at sector 8; reads them back in one piece.
fn check_cut(driver: &mut BlockDriver, cut: &[u32], shift: u64) -> Outcome {
    let len: u32 = cut.iter().sum();
    let bytes = pattern(shift, len as usize);
    let (mut at, mut from, mut buffers) = (driver.data + shift + u64::from(len), 0, Vec::new());
    for part in cut {
        at -= u64::from(*part);
        driver.ram.write(at, &bytes[from..from + *part as usize])?;
        buffers.push(Buffer::to_read(at, *part));
        from += *part as usize;
    }
    let (status, _) = driver.request(RequestKind::Out, 8, &buffers)?;
    demand_status(&format!("a write in pieces of {cut:?}"), status, IoStatus::Ok)?;
    demand(driver.read(8, len)?.1 == bytes, || format!("pieces of {cut:?}, off by {shift}, are mixed up"))
}

const CUTS: [&[u32]; 3] = [&[8192], &[512, 512, 7168], &[1, 511, 3, 3581]];

fn scattered(subject: &Subject) -> Outcome {
    let mut driver = subject.writer()?;
    for cut in CUTS {
        for shift in [0, 1, 512] {
            check_cut(&mut driver, cut, shift)?;
        }
    }
    Ok(())
}

fn direct_chains(subject: &Subject) -> Outcome {
    let mut driver = subject.driver_with(!virtio::RING_INDIRECT_DESC, 1)?;
    read_in_pieces(&mut driver)
}

fn indirect_chains(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    needs(driver.negotiated.offered & virtio::RING_INDIRECT_DESC != 0, "VIRTIO_F_INDIRECT_DESC")?;
    read_in_pieces(&mut driver)
}

fn read_in_pieces(driver: &mut BlockDriver) -> Outcome {
    let whole = driver.read(0, 4096)?.1;
    let data = driver.data;
    driver.ram.write(data, &[0xee; 4096])?;
    let pieces = [512, 512, 1024, 2048].into_iter().scan(data, |at, len| {
        *at += u64::from(len);
        Some(Buffer::to_write(*at - u64::from(len), len))
    });
    let (status, _) = driver.request(RequestKind::In, 0, &pieces.collect::<Vec<_>>())?;
    demand_status("a read in four pieces", status, IoStatus::Ok)?;
    demand(driver.ram.read(data, 4096)? == whole, || "four pieces are not the whole".into())
}

fn flush(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    needs(driver.negotiated.offered & feature::FLUSH != 0, "VIRTIO_BLK_F_FLUSH")?;
    demand_status("FLUSH", driver.flush()?, IoStatus::Ok)
}

fn out_of_range(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    let end = driver.config()?.sectors;
    for (sector, len) in [(end - 1, 1024), (end, 512), (1 << 55, 512), (u64::MAX, 512)] {
        let what = format!("a read of {len} bytes at sector {sector} of {end}");
        demand_status(&what, driver.read(sector, len)?.0, IoStatus::IoErr)?;
        if subject.may_write && driver.negotiated.offered & feature::RO == 0 {
            let what = format!("a write of {len} bytes at sector {sector} of {end}");
            demand_status(&what, driver.write(sector, &vec![1; len as usize])?, IoStatus::IoErr)?;
        }
    }
    demand(driver.config()?.sectors == end, || "the disk has grown".into())?;
    demand_status("the last sector", driver.read(end - 1, 512)?.0, IoStatus::Ok)
}

fn unsupported(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    let (status, _) = driver.request(RequestKind::Unknown, 0, &[])?;
    demand_status("type 4242", status, IoStatus::Unsupported)?;
    demand_status("a read after it", driver.read(0, 512)?.0, IoStatus::Ok)
}

fn read_only(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    needs(driver.negotiated.offered & feature::RO != 0, "a read-only disk")?;
    let before = driver.read(0, 512)?.1;
    demand_status("a write", driver.write(0, &pattern(1, 512))?, IoStatus::IoErr)?;
    demand(driver.read(0, 512)?.1 == before, || "the write was refused, and was done".into())
}

fn write_cache(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    needs(driver.negotiated.offered & feature::CONFIG_WCE != 0, "VIRTIO_BLK_F_CONFIG_WCE")?;
    let at_first = driver.config()?.writeback;
    for on in [false, true, at_first] {
        driver.frontend.set_config(32, &[on.into()])?;
        demand(driver.config()?.writeback == on, || format!("the switch does not read back as {on}"))?;
    }
    Ok(())
}

/// One segment of DISCARD or WRITE_ZEROES on sectors 16 to 31 (virtio 1.2, 5.2.6).
fn on_sectors_16_to_31(driver: &mut BlockDriver, kind: RequestKind) -> Result<IoStatus, End> {
    let mut segment = [0; 16];
    segment[0..8].copy_from_slice(&16u64.to_le_bytes());
    segment[8..12].copy_from_slice(&16u32.to_le_bytes());
    let data = driver.data;
    driver.ram.write(data, &segment)?;
    Ok(driver.request(kind, 0, &[Buffer::to_read(data, 16)])?.0)
}

fn discard(subject: &Subject) -> Outcome {
    let mut driver = subject.writer()?;
    needs(driver.negotiated.offered & feature::DISCARD != 0, "VIRTIO_BLK_F_DISCARD")?;
    let bytes = pattern(2, MIB as usize / 16);
    demand_status("a write", driver.write(0, &bytes)?, IoStatus::Ok)?;
    demand_status("DISCARD", on_sectors_16_to_31(&mut driver, RequestKind::Discard)?, IoStatus::Ok)?;
    let got = driver.read(0, bytes.len() as u32)?.1;
    demand(got[..8192] == bytes[..8192] && got[16384..] == bytes[16384..], || {
        "what is beside it changed".into()
    })
}

fn write_zeroes(subject: &Subject) -> Outcome {
    let mut driver = subject.writer()?;
    needs(driver.negotiated.offered & feature::WRITE_ZEROES != 0, "VIRTIO_BLK_F_WRITE_ZEROES")?;
    let bytes = pattern(3, MIB as usize / 16);
    demand_status("a write", driver.write(0, &bytes)?, IoStatus::Ok)?;
    let status = on_sectors_16_to_31(&mut driver, RequestKind::WriteZeroes)?;
    demand_status("WRITE_ZEROES", status, IoStatus::Ok)?;
    let got = driver.read(0, bytes.len() as u32)?.1;
    demand(got[8192..16384].iter().all(|byte| *byte == 0), || "the sectors are not zeros".into())?;
    demand(got[..8192] == bytes[..8192] && got[16384..] == bytes[16384..], || {
        "what is beside it changed".into()
    })
}
