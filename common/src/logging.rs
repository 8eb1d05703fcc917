//! Diagnostics on standard error, one line an event, in the style of a service: the journal adds the time.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Starts logging for this process. `CLEAVE_LOG` chooses what is said (`warn` unless set), in the syntax of
/// `tracing_subscriber::EnvFilter`: `CLEAVE_LOG=debug`, `CLEAVE_LOG=info,cleave::vhost=trace`.
pub fn init() {
    let filter = EnvFilter::builder()
        .with_env_var("CLEAVE_LOG")
        .with_default_directive(LevelFilter::WARN.into())
        .from_env_lossy();
    // A second call (a test, an embedding program) keeps the first subscriber.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .try_init();
}
