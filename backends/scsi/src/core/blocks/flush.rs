//! SYNCHRONIZE CACHE (SBC-3, 5.26 and 5.27).

use super::Extent;
use crate::task::{Cmd, Io, Outcome, Reply};
use crate::unit::Unit;

pub(crate) fn synchronize_cache_10(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    synchronize(unit, Extent::of_10(cmd))
}

pub(crate) fn synchronize_cache_16(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    synchronize(unit, Extent::of_16(cmd))
}

/// All of the cache, whichever blocks are named: they are among them. With IMMED the answer may come before the end; it
/// need not.
fn synchronize(unit: &Unit, extent: Extent) -> Outcome {
    let medium = unit.ready()?;
    unit.range(medium, extent.or_rest(medium))?;
    Ok(Reply::Io { io: Io::Flush, used: 0 })
}
