//! PERSISTENT RESERVE IN (SPC-4, 6.15).

use super::{Registrant, Type};
use crate::cdb::put;
use crate::task::{Cmd, Nexus, Outcome, Reply};
use crate::unit::Unit;

/// Relative target port identifier: there is one port.
pub(crate) const TARGET_PORT: u16 = 1;

/// Bytes of a SAS TransportID (SPC-4, 7.6.4).
pub(super) const TRANSPORT_ID: usize = 24;

/// PROTOCOL IDENTIFIER of SAS, in format 0.
const SAS: u8 = 0x06;

pub(super) fn transport_id(nexus: Nexus) -> [u8; TRANSPORT_ID] {
    let mut id = [0; TRANSPORT_ID];
    id[0] = SAS;
    put(&mut id, 4, nexus.0.to_be_bytes());
    id
}

pub(super) fn nexus_of(id: &[u8; TRANSPORT_ID]) -> Option<Nexus> {
    (id[0] == SAS).then(|| Nexus(crate::cdb::be64(id, 4)))
}

fn allocation(cmd: &Cmd<'_>) -> u64 {
    cmd.cdb.be16(7).into()
}

/// PRGENERATION and ADDITIONAL LENGTH, then the rest.
fn with_header(generation: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = generation.to_be_bytes().to_vec();
    bytes.extend((body.len() as u32).to_be_bytes());
    bytes.extend(body);
    bytes
}

pub(crate) fn read_keys(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let reservations = unit.reservations();
    let keys: Vec<u8> = reservations.registrants.iter().flat_map(|one| one.key.to_be_bytes()).collect();
    Ok(Reply::Data { bytes: with_header(reservations.generation, &keys), allocation: allocation(cmd) })
}

/// The key is zero for the all registrants types (SPC-4, 5.13.6.3).
pub(crate) fn read_reservation(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let reservations = unit.reservations();
    let mut body = Vec::new();
    if let Some(held) = reservations.held {
        let key = match held.kind.is_all_registrants() {
            true => 0,
            false => reservations.key_of(held.holder).unwrap_or(0),
        };
        body = vec![0; 16];
        put(&mut body, 0, key.to_be_bytes());
        body[13] = held.kind.code();
    }
    Ok(Reply::Data { bytes: with_header(reservations.generation, &body), allocation: allocation(cmd) })
}

/// SPC-4, 6.15.4: all types; registering for all target ports is registering for the one there is.
pub(crate) fn report_capabilities(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    const ATP_C: u8 = 1 << 2;
    const PTPL_C: u8 = 1 << 0;
    const TMV: u8 = 1 << 7;
    /// 011b: the commands that SPC-4, table 65 leaves open are allowed.
    const ALLOW_COMMANDS: u8 = 3 << 4;
    let mut bytes = vec![0; 8];
    put(&mut bytes, 0, 8u16.to_be_bytes());
    bytes[2] = ATP_C | PTPL_C;
    bytes[3] = TMV | ALLOW_COMMANDS | u8::from(unit.reservations().aptpl);
    // WR_EX_AR, EX_AC_RO, WR_EX_RO, EX_AC, WR_EX; EX_AC_AR.
    (bytes[4], bytes[5]) = (0xea, 0x01);
    Ok(Reply::Data { bytes, allocation: allocation(cmd) })
}

/// SPC-4, 6.15.5.
pub(crate) fn read_full_status(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let reservations = unit.reservations();
    let mut body = Vec::new();
    for Registrant { nexus, key } in &reservations.registrants {
        let mut one = [0; 24];
        put(&mut one, 0, key.to_be_bytes());
        if reservations.is_holder(*nexus) {
            one[12] = 1;
            one[13] = reservations.held.map_or(0, |held| Type::code(held.kind));
        }
        put(&mut one, 18, TARGET_PORT.to_be_bytes());
        put(&mut one, 20, (TRANSPORT_ID as u32).to_be_bytes());
        body.extend(one);
        body.extend(transport_id(*nexus));
    }
    Ok(Reply::Data { bytes: with_header(reservations.generation, &body), allocation: allocation(cmd) })
}
