//! The commands of SPC-4, clause 6, SBC-3, clause 5, and MMC-6, clause 6. The ones at the top are looked for most often.

use super::{Command, Devices};
use crate::reservations::{Access, input, output};
use crate::{blocks, cd, inquiry, mode, removal, report};

type Run = fn(&mut crate::Unit, &crate::task::Cmd<'_>) -> crate::task::Outcome;

const fn plain(opcode: u8, devices: Devices, access: Access, usage: &'static [u8], run: Run) -> Command {
    Command { opcode, service_action: None, devices, access, passes_attention: false, usage, run }
}

const fn disk(opcode: u8, access: Access, usage: &'static [u8], run: Run) -> Command {
    plain(opcode, Devices::Disk, access, usage, run)
}

const fn cd(opcode: u8, access: Access, usage: &'static [u8], run: Run) -> Command {
    plain(opcode, Devices::Cd, access, usage, run)
}

const fn all(opcode: u8, access: Access, usage: &'static [u8], run: Run) -> Command {
    plain(opcode, Devices::All, access, usage, run)
}

/// One service action; its number is the low five bits of the usage data's second byte.
const fn service(devices: Devices, access: Access, usage: &'static [u8], run: Run) -> Command {
    let service_action = Some(usage[1] & 0x1f);
    Command { service_action, ..plain(usage[0], devices, access, usage, run) }
}

const fn exempt(command: Command) -> Command {
    Command { passes_attention: true, ..command }
}

const FF: u8 = 0xff;
/// Protection information, DPO, FUA.
const RW: u8 = 0xf8;
/// CONTROL: NACA.
const C: u8 = 0x04;

use Access::{Any, Read, Write};
use Devices::{All, Disk, ThinDisk};

pub(crate) static COMMANDS: &[Command] = &[
    // READ and WRITE (SBC-3, 5.11 to 5.13, 5.33 to 5.35), SYNCHRONIZE CACHE (5.26, 5.27), UNMAP (5.28).
    all(0x28, Read, &[0x28, RW, FF, FF, FF, FF, 0, FF, FF, C], blocks::transfer::read_10),
    disk(0x2a, Write, &[0x2a, RW, FF, FF, FF, FF, 0, FF, FF, C], blocks::transfer::write_10),
    disk(
        0x88,
        Read,
        &[0x88, RW, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, C],
        blocks::transfer::read_16,
    ),
    disk(
        0x8a,
        Write,
        &[0x8a, RW, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, C],
        blocks::transfer::write_16,
    ),
    disk(0x35, Write, &[0x35, 0x02, FF, FF, FF, FF, 0, FF, FF, C], blocks::flush::synchronize_cache_10),
    disk(
        0x91,
        Write,
        &[0x91, 0x02, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, C],
        blocks::flush::synchronize_cache_16,
    ),
    plain(0x42, ThinDisk, Write, &[0x42, 0x01, 0, 0, 0, 0, 0, FF, FF, C], blocks::provision::unmap),
    disk(0x08, Read, &[0x08, 0x1f, FF, FF, FF, C], blocks::transfer::read_6),
    disk(0x0a, Write, &[0x0a, 0x1f, FF, FF, FF, C], blocks::transfer::write_6),
    all(0xa8, Read, &[0xa8, RW, FF, FF, FF, FF, FF, FF, FF, FF, 0, C], blocks::transfer::read_12),
    disk(0xaa, Write, &[0xaa, RW, FF, FF, FF, FF, FF, FF, FF, FF, 0, C], blocks::transfer::write_12),
    // Everything that a unit is asked before it is used (SPC-4, clause 6).
    all(0x00, Any, &[0x00, 0, 0, 0, 0, C], removal::test_unit_ready),
    exempt(all(0x12, Any, &[0x12, 0x01, FF, FF, FF, C], inquiry::inquiry)),
    exempt(all(0x03, Any, &[0x03, 0x01, 0, 0, FF, C], report::request_sense)),
    exempt(all(0xa0, Any, &[0xa0, 0, FF, 0, 0, 0, FF, FF, FF, FF, 0, C], report::luns_of_one)),
    all(0x1a, Read, &[0x1a, 0x08, FF, FF, FF, C], mode::sense::mode_sense_6),
    all(0x5a, Read, &[0x5a, 0x18, FF, FF, 0, 0, 0, FF, FF, C], mode::sense::mode_sense_10),
    all(0x15, Write, &[0x15, 0x11, 0, 0, FF, C], mode::select::mode_select_6),
    all(0x55, Write, &[0x55, 0x11, 0, 0, 0, 0, 0, FF, FF, C], mode::select::mode_select_10),
    all(0x1b, Write, &[0x1b, 0x01, 0, 0, 0xf7, C], removal::start_stop_unit),
    all(0x1e, Write, &[0x1e, 0, 0, 0, 0x03, C], removal::prevent_allow),
    service(All, Read, &[0xa3, 0x0c, 0x87, FF, FF, FF, FF, FF, FF, FF, 0, C], report::operation_codes),
    service(All, Read, &[0xa3, 0x0d, 0x80, 0, 0, 0, FF, FF, FF, FF, 0, C], report::task_management_functions),
    // READ CAPACITY (SBC-3, 5.15, 5.16), VERIFY (5.29 to 5.31), WRITE SAME (5.43, 5.44), COMPARE AND WRITE (5.2).
    all(0x25, Any, &[0x25, 0, FF, FF, FF, FF, 0, 0, 0x01, C], blocks::capacity::read_capacity_10),
    service(
        Disk,
        Any,
        &[0x9e, 0x10, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0x01, C],
        blocks::capacity::read_capacity_16,
    ),
    disk(0x2f, Read, &[0x2f, 0xf6, FF, FF, FF, FF, 0, FF, FF, C], blocks::verify::verify_10),
    disk(0xaf, Read, &[0xaf, 0xf6, FF, FF, FF, FF, FF, FF, FF, FF, 0, C], blocks::verify::verify_12),
    disk(
        0x8f,
        Read,
        &[0x8f, 0xf6, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, C],
        blocks::verify::verify_16,
    ),
    disk(0x41, Write, &[0x41, 0xf8, FF, FF, FF, FF, 0, FF, FF, C], blocks::provision::write_same_10),
    disk(
        0x93,
        Write,
        &[0x93, 0xf9, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, C],
        blocks::provision::write_same_16,
    ),
    disk(
        0x89,
        Write,
        &[0x89, 0xf8, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0, 0, FF, 0, C],
        blocks::verify::compare_and_write,
    ),
    // PERSISTENT RESERVE IN and OUT (SPC-4, 6.15 and 6.16). What conflicts is for the key to say.
    service(Disk, Any, &[0x5e, 0x00, 0, 0, 0, 0, 0, FF, FF, C], input::read_keys),
    service(Disk, Any, &[0x5e, 0x01, 0, 0, 0, 0, 0, FF, FF, C], input::read_reservation),
    service(Disk, Any, &[0x5e, 0x02, 0, 0, 0, 0, 0, FF, FF, C], input::report_capabilities),
    service(Disk, Any, &[0x5e, 0x03, 0, 0, 0, 0, 0, FF, FF, C], input::read_full_status),
    service(Disk, Any, &[0x5f, 0x00, 0, 0, 0, FF, FF, FF, FF, C], output::register),
    service(Disk, Any, &[0x5f, 0x01, FF, 0, 0, FF, FF, FF, FF, C], output::reserve),
    service(Disk, Any, &[0x5f, 0x02, FF, 0, 0, FF, FF, FF, FF, C], output::release),
    service(Disk, Any, &[0x5f, 0x03, 0, 0, 0, FF, FF, FF, FF, C], output::clear),
    service(Disk, Any, &[0x5f, 0x04, FF, 0, 0, FF, FF, FF, FF, C], output::preempt),
    service(Disk, Any, &[0x5f, 0x05, FF, 0, 0, FF, FF, FF, FF, C], output::preempt_and_abort),
    service(Disk, Any, &[0x5f, 0x06, 0, 0, 0, FF, FF, FF, FF, C], output::register_and_ignore),
    service(Disk, Any, &[0x5f, 0x07, 0, 0, 0, FF, FF, FF, FF, C], output::register_and_move),
    // MMC-6: GET CONFIGURATION and GET EVENT STATUS NOTIFICATION, which pass unit attentions, READ TOC, READ DISC
    // INFORMATION, READ DISC STRUCTURE, MECHANISM STATUS, READ CD, SET CD SPEED, SEEK.
    exempt(cd(0x46, Any, &[0x46, 0x03, FF, FF, 0, 0, 0, FF, FF, C], cd::configuration::get_configuration)),
    exempt(cd(0x4a, Any, &[0x4a, 0x01, 0, 0, FF, 0, 0, FF, FF, C], cd::event::get_event_status_notification)),
    cd(0x43, Read, &[0x43, 0x02, 0x0f, 0, 0, 0, FF, FF, FF, 0xc4], cd::toc::read_toc),
    cd(0x51, Read, &[0x51, 0x07, 0, 0, 0, 0, 0, FF, FF, C], cd::disc::read_disc_information),
    cd(0xad, Read, &[0xad, 0x0f, FF, FF, FF, FF, FF, FF, FF, FF, 0xc0, C], cd::disc::read_disc_structure),
    cd(0xbd, Read, &[0xbd, 0, 0, 0, 0, 0, 0, 0, FF, FF, 0, C], cd::disc::mechanism_status),
    cd(0xbe, Read, &[0xbe, 0x1e, FF, FF, FF, FF, FF, FF, FF, 0xfe, 0x07, C], cd::disc::read_cd),
    cd(0xbb, Read, &[0xbb, 0x03, FF, FF, FF, FF, 0, 0, 0, 0, 0, C], cd::disc::set_cd_speed),
    cd(0x2b, Read, &[0x2b, 0, FF, FF, FF, FF, 0, 0, 0, C], cd::disc::seek_10),
];
