//! fio's io_uring engine on the same file: what the file can give.

use crate::args::word;
use crate::plan::{Row, Settings};
use crate::run::Turn;
use crate::scratch::{Image, program, tools};
use crate::{BenchError, Result};

/// One turn of fio.
///
/// # Errors
/// There is no fio, it failed, or its answer is not as it is known.
pub fn turn(image: &Image, row: &Row, settings: &Settings) -> Result<Turn> {
    let mut fio = tools()?.command("fio");
    fio.args(["--name=bench", "--ioengine=io_uring", "--time_based", "--group_reporting", "--thread"]);
    fio.args(["--norandommap", "--output-format=json", "--percentile_list=50:90:99:99.9"]);
    // A colon separates names in fio's option.
    fio.arg(format!("--filename={}", image.path.display().to_string().replace(':', "\\:")));
    fio.arg(format!("--direct={}", u8::from(image.direct))).arg(format!("--rw={}", word(row.rw)));
    fio.arg(format!("--rwmixread={}", row.read_percent));
    fio.arg(format!("--bs={}", row.block_size)).arg(format!("--iodepth={}", row.depth));
    fio.arg(format!("--numjobs={}", row.queues))
        .arg(format!("--runtime={}ms", (settings.runtime * 1e3).ceil()));
    if !row.rw.is_random() {
        // Each job has a part of its own.
        fio.arg(format!("--offset_increment={}%", 100 / row.queues));
    }
    if let Some(cpu) = settings.pin {
        fio.arg(format!("--cpus_allowed={cpu}"));
    }
    parse(&program(&mut fio)?, row)
}

fn parse(output: &[u8], row: &Row) -> Result<Turn> {
    let bad = || BenchError::Usage("fio's answer is no JSON as it is known".into());
    let json: serde_json::Value = serde_json::from_slice(output).map_err(|_| bad())?;
    let job = &json["jobs"][0];
    let number = |value: &serde_json::Value| value.as_f64().ok_or_else(bad);
    let mut turn = Turn::default();
    let (mut requests, mut runtime_ms) = (0.0, 0.0);
    let sides = [("read", row.read_percent > 0), ("write", row.read_percent < 100)];
    for (side, _) in sides.into_iter().filter(|(_, used)| *used) {
        let side = &job[side];
        turn.iops += number(&side["iops"])?;
        requests += number(&side["total_ios"])?;
        runtime_ms = number(&side["runtime"])?.max(runtime_ms);
        let percentiles = &side["clat_ns"]["percentile"];
        for (at, name) in ["50.000000", "90.000000", "99.000000", "99.900000"].into_iter().enumerate() {
            turn.percentiles_us[at] = turn.percentiles_us[at].max(number(&percentiles[name])? / 1e3);
        }
    }
    // A percentage of one CPU, the mean of all jobs.
    let busy = (number(&job["usr_cpu"])? + number(&job["sys_cpu"])?) / 100.0 * f64::from(row.queues);
    turn.cpu_us = Some(busy * runtime_ms * 1e3 / requests.max(1.0));
    Ok(turn)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Pattern;

    #[test]
    fn both_sides_of_a_mixed_load_count() {
        let side = |iops: f64, p50: f64| {
            serde_json::json!({
                "iops": iops, "total_ios": iops, "runtime": 1000,
                "clat_ns": { "percentile": {
                    "50.000000": p50, "90.000000": 2e3, "99.000000": 3e3, "99.900000": 4e3 } },
            })
        };
        let answer = serde_json::json!({ "jobs": [
            { "read": side(700.0, 1000.0), "write": side(300.0, 1500.0), "usr_cpu": 5.0, "sys_cpu": 15.0 } ] });
        let row = Row { read_percent: 70, rw: Pattern::Randrw, queues: 2, ..Row::default() };
        let turn = parse(answer.to_string().as_bytes(), &row).unwrap();
        assert_eq!((turn.iops, turn.percentiles_us), (1000.0, [1.5, 2.0, 3.0, 4.0]));
        // 0.2 of two CPUs for a second, and a thousand requests.
        assert_eq!(turn.cpu_us, Some(400.0));
        assert!(parse(b"fio: job failed", &row).is_err());
    }
}
