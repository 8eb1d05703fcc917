//! `cleave check`: what this host offers and lacks, and what to do about it.
//!
//! The host counts as able when the probe guest ran; everything else explains why it did not, or what a guest will
//! miss.

mod host;
mod probe;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io::{self, Write};

use cleave_common::exit::ExitCode;
use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    /// A guest runs, but something it may want is missing.
    Warn,
    /// No stock guest runs while this is so.
    Fail,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    detail: String,
    /// What to do; absent where nothing is to be done.
    advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, detail: detail.into(), advice: None }
    }

    fn warn(name: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, status: Status::Warn, detail: detail.into(), advice: Some(advice.into()) }
    }

    fn fail(name: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, status: Status::Fail, detail: detail.into(), advice: Some(advice.into()) }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    runs_stock_guest: bool,
    checks: Vec<Check>,
}

/// Examines the host and prints the report. [`ExitCode::Host`] if it runs no stock guest.
pub fn run(json: bool) -> ExitCode {
    let report = Report::make();
    let text = if json {
        serde_json::to_string_pretty(&report).map(|text| text + "\n").map_err(io::Error::other)
    } else {
        Ok(report.to_string())
    };
    // A reader that went away has seen what it wanted.
    let written = text.and_then(|text| io::stdout().write_all(text.as_bytes()));
    match (written, report.runs_stock_guest) {
        (Err(error), _) if error.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("cleave: cannot write the report to standard output: {error}");
            ExitCode::Internal
        }
        (_, true) => ExitCode::Success,
        (_, false) => ExitCode::Host,
    }
}

impl Report {
    fn make() -> Self {
        let mut checks = vec![host::cpu()];
        let (mut kvm_checks, runs_stock_guest) = probe::kvm();
        checks.append(&mut kvm_checks);
        checks.extend([
            host::nested(),
            host::memory(),
            host::shared_huge_pages(),
            host::huge_pages(),
            host::tun(),
            host::io_uring(),
        ]);
        Self { runs_stock_guest, checks }
    }
}

/// A line a check, then what to do about it.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        for check in &self.checks {
            let mark = match check.status {
                Status::Ok => "ok  ",
                Status::Warn => "warn",
                Status::Fail => "FAIL",
            };
            writeln!(f, "{mark}  {:width$}  {}", check.name, check.detail)?;
            if let Some(advice) = &check.advice {
                writeln!(f, "      {:width$}  -> {advice}", "")?;
            }
        }
        let verdict = if self.runs_stock_guest {
            "This host runs stock guests."
        } else {
            "This host does not run stock guests: see what is marked FAIL."
        };
        writeln!(f, "\n{verdict}")
    }
}
