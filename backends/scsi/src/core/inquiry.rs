//! INQUIRY and the vital product data (SPC-4, 6.6 and 7.8, and the pages of SBC-3).

use crate::blocks::{provision, verify};
use crate::cdb::put;
use crate::config::{Disk, REVISION, VENDOR};
use crate::reservations::input::TARGET_PORT;
use crate::sense::Sense;
use crate::task::{Cmd, Outcome, Reply};
use crate::unit::{Kind, Unit};

const SUPPORTED_PAGES: u8 = 0x00;
const UNIT_SERIAL_NUMBER: u8 = 0x80;
const DEVICE_IDENTIFICATION: u8 = 0x83;
const BLOCK_LIMITS: u8 = 0xb0;
const BLOCK_DEVICE_CHARACTERISTICS: u8 = 0xb1;
const LOGICAL_BLOCK_PROVISIONING: u8 = 0xb2;

/// Bytes of standard INQUIRY data.
const STANDARD: usize = 96;

/// PERIPHERAL DEVICE TYPE.
const DISK: u8 = 0x00;
const CD: u8 = 0x05;

/// PERIPHERAL QUALIFIER and DEVICE TYPE of a LUN that has no unit: of LUN 0, which has to answer, and of others.
const NOT_CONNECTED: u8 = 0x3f;
const NOT_SUPPORTED: u8 = 0x7f;

pub(crate) fn inquiry(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let page = cmd.cdb.byte(2);
    let bytes = match cmd.cdb.bit(1, 0) {
        true => vital_product_data(unit, page).ok_or_else(|| Sense::cdb(2))?,
        false if page != 0 => return Err(Sense::cdb(2).into()),
        false => standard(unit.device_type(), unit.is_removable(), &unit.identity.product),
    };
    Ok(Reply::Data { bytes, allocation: cmd.cdb.be16(3).into() })
}

/// The answer to INQUIRY of a LUN that is not there (SPC-4, 6.6.2: PERIPHERAL QUALIFIER).
pub(crate) fn of_nothing(cmd: &Cmd<'_>, is_lun_0: bool) -> Outcome {
    if cmd.cdb.bit(1, 0) || cmd.cdb.byte(2) != 0 {
        return Err(Sense::cdb(2).into());
    }
    let device_type = if is_lun_0 { NOT_CONNECTED } else { NOT_SUPPORTED };
    let bytes = standard(device_type, false, &[b' '; 16]);
    Ok(Reply::Data { bytes, allocation: cmd.cdb.be16(3).into() })
}

fn standard(device_type: u8, removable: bool, product: &[u8; 16]) -> Vec<u8> {
    /// VERSION: SPC-4.
    const VERSION: u8 = 0x06;
    /// RESPONSE DATA FORMAT 2; HISUP: LUNs are hierarchical.
    const FORMAT: u8 = 0x12;
    /// Byte 7.
    const CMDQUE: u8 = 1 << 1;
    let mut bytes = vec![0; STANDARD];
    bytes[0] = device_type;
    bytes[1] = u8::from(removable) << 7;
    bytes[2] = VERSION;
    bytes[3] = FORMAT;
    bytes[4] = (STANDARD - 5) as u8;
    bytes[7] = CMDQUE;
    put(&mut bytes, 8, VENDOR);
    put(&mut bytes, 16, *product);
    put(&mut bytes, 32, REVISION);
    // SAM-5, SPC-4 and SBC-3 or MMC-6, none of a certain revision (SPC-4, 6.6.2).
    let type_version: u16 = match device_type {
        DISK => 0x04c0,
        CD => 0x04e0,
        _ => 0,
    };
    for (at, version) in [(58, 0x00a0u16), (60, 0x0460), (62, type_version)] {
        put(&mut bytes, at, version.to_be_bytes());
    }
    bytes
}

impl Unit {
    fn device_type(&self) -> u8 {
        if self.is_cd() { CD } else { DISK }
    }

    fn vital_pages(&self) -> Vec<u8> {
        let mut pages = vec![SUPPORTED_PAGES];
        if !self.identity.serial.is_empty() {
            pages.push(UNIT_SERIAL_NUMBER);
        }
        pages.push(DEVICE_IDENTIFICATION);
        if !self.is_cd() {
            pages.extend([BLOCK_LIMITS, BLOCK_DEVICE_CHARACTERISTICS, LOGICAL_BLOCK_PROVISIONING]);
        }
        pages
    }
}

fn vital_product_data(unit: &Unit, page: u8) -> Option<Vec<u8>> {
    let pages = unit.vital_pages();
    if !pages.contains(&page) {
        return None;
    }
    let body = match (page, &unit.kind) {
        (SUPPORTED_PAGES, _) => pages,
        (UNIT_SERIAL_NUMBER, _) => unit.identity.serial.clone().into_bytes(),
        (DEVICE_IDENTIFICATION, _) => designators(unit),
        (BLOCK_LIMITS, Kind::Disk(disk)) => block_limits(disk),
        (BLOCK_DEVICE_CHARACTERISTICS, Kind::Disk(disk)) => characteristics(disk),
        (LOGICAL_BLOCK_PROVISIONING, Kind::Disk(disk)) => provisioning(disk),
        _ => return None,
    };
    let [high, low] = (body.len() as u16).to_be_bytes();
    let mut bytes = vec![unit.device_type(), page, high, low];
    bytes.extend(body);
    Some(bytes)
}

/// SPC-4, 7.8.6: the unit by vendor, product and serial number, and by its world wide name if it has one; the port.
fn designators(unit: &Unit) -> Vec<u8> {
    const BINARY: u8 = 1;
    const ASCII: u8 = 2;
    const T10_VENDOR_ID: u8 = 1;
    const NAA: u8 = 3;
    /// ASSOCIATION: target port.
    const RELATIVE_TARGET_PORT: u8 = 1 << 4 | 4;
    let mut bytes = Vec::new();
    let mut push = |code_set: u8, kind: u8, designator: &[u8]| {
        bytes.extend([code_set, kind, 0, designator.len() as u8]);
        bytes.extend(designator);
    };
    let identity = &unit.identity;
    let mut name = VENDOR.to_vec();
    name.extend(identity.product);
    name.extend(identity.serial.as_bytes());
    push(ASCII, T10_VENDOR_ID, &name);
    if let Some(naa) = identity.naa {
        push(BINARY, NAA, &naa.to_be_bytes());
    }
    let [high, low] = TARGET_PORT.to_be_bytes();
    push(BINARY, RELATIVE_TARGET_PORT, &[0, 0, high, low]);
    bytes
}

/// SBC-3, Block Limits VPD page. Offsets are the standard's, less the header's four bytes.
fn block_limits(disk: &Disk) -> Vec<u8> {
    const UGAVALID: u32 = 1 << 31;
    let mut page = vec![0; 0x3c];
    page[1] = verify::MAX_COMPARE_AND_WRITE;
    put(&mut page, 2, disk.optimal_granularity.to_be_bytes());
    put(&mut page, 4, disk.max_transfer.to_be_bytes());
    put(&mut page, 8, disk.optimal_transfer.to_be_bytes());
    if let Some(unmap) = disk.unmap {
        put(&mut page, 16, provision::MAX_UNMAP_BLOCKS.to_be_bytes());
        put(&mut page, 20, provision::MAX_UNMAP_DESCRIPTORS.to_be_bytes());
        put(&mut page, 24, unmap.granularity.to_be_bytes());
        put(&mut page, 28, UGAVALID.to_be_bytes());
    }
    put(&mut page, 32, provision::max_write_same(disk.block_size).to_be_bytes());
    page
}

/// SBC-3, Block Device Characteristics VPD page.
fn characteristics(disk: &Disk) -> Vec<u8> {
    let mut page = vec![0; 0x3c];
    put(&mut page, 0, disk.rotation_rate.to_be_bytes());
    page
}

/// SBC-3, Logical Block Provisioning VPD page.
fn provisioning(disk: &Disk) -> Vec<u8> {
    const LBPU: u8 = 1 << 7;
    const LBPWS: u8 = 1 << 6;
    const LBPWS10: u8 = 1 << 5;
    const LBPRZ: u8 = 1 << 2;
    const THIN: u8 = 2;
    let mut page = vec![0; 4];
    if let Some(unmap) = disk.unmap {
        page[1] = LBPU | LBPWS | LBPWS10 | if unmap.reads_zeroes { LBPRZ } else { 0 };
        page[2] = THIN;
    }
    page
}
