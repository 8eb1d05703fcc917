//! What the control socket can be asked.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use cleave_common::control::{ControlError, Request, nothing, value_of};
use cleave_common::options;
use cleave_common::size::ByteSize;
use cleave_runtime::Control;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use crate::config_space::{PAGE, feature};
use crate::shared::{Shared, Target};

/// Shortest time between two questions for statistics: a guest has other things to do.
const LEAST_INTERVAL: Duration = Duration::from_millis(100);

/// Most runs of hinted pages in an answer.
const MOST_RUNS: usize = 4096;

pub(crate) struct BalloonControl(pub(crate) Arc<Shared>);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetArguments {
    #[serde(deserialize_with = "options::from_word")]
    size: Wanted,
}

/// What the guest is to have, in bytes; `None` is all.
#[derive(Debug)]
struct Wanted(Option<u64>);

impl FromStr for Wanted {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "all" => Ok(Self(None)),
            size => size
                .parse::<ByteSize>()
                .map(|size| Self(Some(size.bytes())))
                .map_err(|error| format!("{error}; or all")),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonArguments {
    value: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct IntervalArguments {
    /// 0 is never.
    seconds: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SwitchArguments {
    #[serde(deserialize_with = "switch")]
    state: bool,
}

/// `on` and `off`, or JSON's words.
fn switch<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    let said = Value::deserialize(deserializer)?;
    said.as_bool()
        .or_else(|| said.as_str().and_then(options::switch))
        .ok_or_else(|| serde::de::Error::custom(format!("state is on or off, and not {said}")))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HintArguments {
    action: HintAction,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum HintAction {
    Start,
    Stop,
    Done,
}

impl Control for BalloonControl {
    fn commands(&self) -> &'static [&'static str] {
        &[
            "target",
            "status",
            "stats",
            "set-interval",
            "auto",
            "inhibit",
            "hint",
            "query-hints",
            "balloon",
            "query-balloon",
        ]
    }

    fn execute(&self, request: Request) -> Result<Value, ControlError> {
        let shared = &*self.0;
        match request.command.as_str() {
            "target" => {
                let TargetArguments { size: Wanted(size) } = request.arguments()?;
                Ok(answer(shared, &shared.set_target(size)))
            }
            // As QMP's.
            "balloon" => {
                let BalloonArguments { value } = request.arguments()?;
                shared.set_target(Some(value));
                Ok(nothing())
            }
            "query-balloon" => Ok(json!({"actual": present(shared)})),
            "stats" => self.statistics(),
            "set-interval" => {
                let IntervalArguments { seconds } = request.arguments()?;
                shared.set_interval(interval(seconds)?);
                Ok(nothing())
            }
            "auto" => {
                let SwitchArguments { state } = request.arguments()?;
                match shared.set_auto(state) {
                    true => Ok(nothing()),
                    false => Err(ControlError::new(
                        "there is no mark to keep the guest's memory at: start the daemon with --auto free=SIZE",
                    )),
                }
            }
            "inhibit" => {
                let SwitchArguments { state } = request.arguments()?;
                let outcome = shared.set_inhibited(state);
                Ok(json!({"given-back": outcome.given_back}))
            }
            "hint" => self.hint(request.arguments()?),
            "query-hints" => self.hints(),
            _ => self.status(),
        }
    }
}

impl BalloonControl {
    fn status(&self) -> Result<Value, ControlError> {
        let status = self.0.status();
        let (has_driver, waiting, page) = {
            let host = self.0.host();
            (host.is_in_use(), host.waiting(), host.page())
        };
        let pages = |count: u32| u64::from(count) * PAGE;
        let mut value = json!({
            "memory": status.kept.memory,
            "target": status.kept.memory.saturating_sub(pages(status.config.num_pages)),
            "actual": status.kept.memory.saturating_sub(pages(status.config.actual)),
            "balloon": pages(status.config.actual),
            "driver": has_driver,
            "features": features(status.features),
            "auto": status.kept.auto,
            "interval-ms": status.kept.interval_ms,
            "inhibited": status.kept.inhibited,
            "poison": status.config.poison_val,
            "host-page": page,
            "not-given-back": waiting,
        });
        if let (Value::Object(all), Value::Object(counts)) =
            (&mut value, value_of(&self.0.counters.counts())?)
        {
            all.extend(counts);
        }
        Ok(value)
    }

    /// What the guest said last; it is asked again, for whoever comes next.
    fn statistics(&self) -> Result<Value, ControlError> {
        let status = self.0.status();
        if status.features & feature::STATS_VQ == 0 {
            return Err(no_driver("statistics"));
        }
        self.0.ask();
        let Some((statistics, age)) = status.statistics else {
            return Err(ControlError::new("the guest has not answered yet: it is asked; try again"));
        };
        Ok(json!({"age-ms": age.as_millis() as u64, "guest": value_of(&statistics)?}))
    }

    fn hint(&self, HintArguments { action }: HintArguments) -> Result<Value, ControlError> {
        if self.0.features() & feature::FREE_PAGE_HINT == 0 {
            return Err(no_driver("hints"));
        }
        self.0.with_hints(|hints| match action {
            HintAction::Start => hints.start(),
            HintAction::Stop => hints.stop(),
            HintAction::Done => hints.done(),
        });
        Ok(nothing())
    }

    fn hints(&self) -> Result<Value, ControlError> {
        self.0.with_hints(|hints| {
            let runs = hints.free().runs();
            let shown: Vec<Value> = runs
                .iter()
                .take(MOST_RUNS)
                .map(|run| json!({"start": run.start, "size": run.len()}))
                .collect();
            Ok(json!({
                "stage": value_of(&hints.stage())?,
                "free": hints.free().len(),
                "runs": shown,
                "more-runs": runs.len().saturating_sub(MOST_RUNS),
            }))
        })
    }
}

/// Bytes that the guest has.
fn present(shared: &Shared) -> u64 {
    let status = shared.status();
    status.kept.memory.saturating_sub(u64::from(status.config.actual) * PAGE)
}

fn no_driver(what: &str) -> ControlError {
    ControlError::new(format!(
        "there are no {what}: the guest has no driver for its balloon yet, or an old one"
    ))
}

fn interval(seconds: f64) -> Result<Duration, ControlError> {
    let interval = Duration::try_from_secs_f64(seconds)
        .map_err(|_| ControlError::new("set-interval: seconds is a number from 0.1 on, or 0 for never"))?;
    if !interval.is_zero() && interval < LEAST_INTERVAL {
        return Err(ControlError::new(
            "set-interval: a guest is asked every 0.1 seconds at most; 0 is never",
        ));
    }
    Ok(interval)
}

fn answer(shared: &Shared, target: &Target) -> Value {
    let mut answer = json!({"size": target.size, "actual": present(shared)});
    if let Some(because) = &target.because {
        answer["because"] = json!(because);
    }
    if !shared.host().is_in_use() {
        answer["note"] = json!("no driver runs the balloon now: this is for the next one");
    }
    answer
}

/// The names of the specification.
fn features(bits: u64) -> Vec<&'static str> {
    let names = [
        (feature::STATS_VQ, "stats"),
        (feature::DEFLATE_ON_OOM, "deflate-on-oom"),
        (feature::FREE_PAGE_HINT, "free-page-hint"),
        (feature::PAGE_POISON, "page-poison"),
        (feature::REPORTING, "reporting"),
    ];
    names.into_iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| name).collect()
}
