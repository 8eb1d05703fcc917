//! `cleave memory`: where the memory of running machines is, in the kernel's own figures.
//!
//! Machines are found in /proc, by what they are: processes that were started as `cleave run` and map a file of guest
//! memory. No machine has to answer, so one that hangs is seen too.

mod machine;
mod process;
mod smaps;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io::{self, Write};

use cleave_common::exit::{ExitCode, Failure};

use machine::{Figures, Machine, Sharer};

/// Prints the memory of the machines whose VMMs are `pids`, or of all that this user may look at.
pub fn run(pids: &[u32], json: bool) -> Result<(), Failure> {
    let machines =
        match pids {
            [] => machine::all(),
            pids => pids.iter().map(|pid| machine::one(*pid)).collect::<Result<_, _>>().map_err(|error| {
                match error {
                    machine::MachineError::Forbidden { .. } => Failure::host(error),
                    _ => Failure::usage(error),
                }
            })?,
        };
    let text = if json {
        serde_json::to_string_pretty(&machines).map_err(Failure::internal)? + "\n"
    } else if machines.is_empty() {
        eprintln!("cleave: no machine runs that this user may look at");
        return Ok(());
    } else {
        Table(&machines).to_string()
    };
    match io::stdout().write_all(text.as_bytes()) {
        // A reader that went away has seen what it wanted.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(ExitCode::Internal, format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// A line a process; a machine's own figures are on its VMM's line.
struct Table<'a>(&'a [Machine]);

const HEADS: [&str; 10] =
    ["PID", "PROCESS", "GUEST", "RESIDENT", "SWAPPED", "HOLES", "MAPPED", "HUGE", "OWN", "OWN-SWAP"];

impl Table<'_> {
    fn rows(&self) -> Vec<[String; HEADS.len()]> {
        let mut rows = vec![HEADS.map(str::to_owned)];
        for machine in self.0 {
            let Machine { guest, resident, swapped, holes, .. } = *machine;
            let own = [guest, resident, swapped, holes].map(readable);
            for (at, process) in machine.processes.iter().enumerate() {
                let shared = if at == 0 { own.clone() } else { own.each_ref().map(|_| "-".to_owned()) };
                rows.push(row(process, if at == 0 { "" } else { "  " }, shared));
            }
        }
        rows
    }
}

fn row(
    process: &Sharer,
    indent: &str,
    [guest, resident, swapped, holes]: [String; 4],
) -> [String; HEADS.len()] {
    let [mapped, huge, own, own_swapped] = match process.figures {
        Some(Figures { mapped, huge, own, own_swapped }) => [mapped, huge, own, own_swapped].map(readable),
        None => [(); 4].map(|()| "?".to_owned()),
    };
    let name = format!("{indent}{}", process.name);
    [process.pid.to_string(), name, guest, resident, swapped, holes, mapped, huge, own, own_swapped]
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.rows();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<_> = (0..HEADS.len()).map(width).collect();
        for row in &rows {
            let [pid, name, figures @ ..] = row;
            write!(f, "{pid:>0$}  {name:1$}", widths[0], widths[1])?;
            figures.iter().zip(&widths[2..]).try_for_each(|(text, width)| write!(f, "  {text:>width$}"))?;
            writeln!(f)?;
        }
        Ok(())
    }
}

/// A size for a table, to three or four digits.
fn readable(bytes: u64) -> String {
    match bytes {
        0 => "0".to_owned(),
        1..0x100_0000 => format!("{}K", bytes >> 10),
        0x100_0000..0x40_0000_0000 => format!("{}M", bytes >> 20),
        _ => format!("{}G", bytes >> 30),
    }
}
