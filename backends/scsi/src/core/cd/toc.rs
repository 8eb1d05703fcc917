//! READ TOC/PMA/ATIP (MMC-6).

use super::{address, minute_second_frame};
use crate::cdb::put;
use crate::config::Medium;
use crate::sense::Sense;
use crate::task::{Cmd, Outcome, Reply};
use crate::unit::Unit;

/// ADR 1, CONTROL 4: a data track.
const DATA_TRACK: u8 = 0x14;
const LEAD_OUT: u8 = 0xaa;

pub(crate) fn read_toc(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let medium = unit.ready()?;
    let in_time = cmd.cdb.bit(1, 1);
    // Older drivers have the format in CONTROL (SFF-8020).
    let format = match cmd.cdb.byte(2) & 0x0f {
        0 => cmd.cdb.byte(9) >> 6,
        format => format,
    };
    let bytes = match format {
        0 => tracks(medium, in_time, cmd.cdb.byte(6))?,
        1 => sessions(in_time),
        2 => full(medium, cmd.cdb.byte(6))?,
        _ => return Err(Sense::cdb_bit(2, 3).into()),
    };
    Ok(Reply::Data { bytes, allocation: cmd.cdb.be16(7).into() })
}

/// A length, first and last track or session, descriptors.
fn with_header(body: &[u8]) -> Vec<u8> {
    let [high, low] = (body.len() as u16 + 2).to_be_bytes();
    let mut bytes = vec![high, low, 1, 1];
    bytes.extend(body);
    bytes
}

fn position(block: u64, in_time: bool) -> [u8; 4] {
    match in_time {
        true => {
            let [minute, second, frame] = minute_second_frame(block);
            [0, minute, second, frame]
        }
        false => address(block).to_be_bytes(),
    }
}

/// Format 0: the tracks from the one that is asked for, and where the last one ends.
fn tracks(medium: Medium, in_time: bool, first: u8) -> Result<Vec<u8>, Sense> {
    if first > 1 && first != LEAD_OUT {
        return Err(Sense::cdb(6));
    }
    let mut body = Vec::new();
    let mut push = |track: u8, block: u64| {
        body.extend([0, DATA_TRACK, track, 0]);
        body.extend(position(block, in_time));
    };
    if first != LEAD_OUT {
        push(1, 0);
    }
    push(LEAD_OUT, medium.blocks);
    Ok(with_header(&body))
}

/// Format 1: the first track of the last session.
fn sessions(in_time: bool) -> Vec<u8> {
    let mut body = [0, DATA_TRACK, 1, 0, 0, 0, 0, 0];
    put(&mut body, 4, position(0, in_time));
    with_header(&body)
}

/// Format 2: what the lead-in says. Its numbers are times always.
fn full(medium: Medium, first_session: u8) -> Result<Vec<u8>, Sense> {
    if first_session > 1 {
        return Err(Sense::cdb(6));
    }
    let entry = |point: u8, position: [u8; 3]| {
        let [minute, second, frame] = position;
        [1, DATA_TRACK, 0, point, 0, 0, 0, 0, minute, second, frame]
    };
    let first_and_last = [entry(0xa0, [1, 0, 0]), entry(0xa1, [1, 0, 0])];
    let end = entry(0xa2, minute_second_frame(medium.blocks));
    let track = entry(1, minute_second_frame(0));
    Ok(with_header(&[first_and_last[0], first_and_last[1], end, track].concat()))
}
