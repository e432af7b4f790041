//! The main function of a service.

use std::{future::Future, process::ExitCode};

use polymq_core::{Bus, Failure, run_service};

/// Runs a whole service on a runtime of its own; what `#[polymq::main]` expands to.
///
/// Starts a multi-threaded tokio runtime and calls [`run_service`] with `main`. Answers success, or prints the error
/// as one line to stderr and answers 1. Tasks and blocking functions that still run then are left behind.
///
/// ```no_run
/// use polymq::prelude::*;
///
/// async fn serve(bus: Bus) -> Result<()> {
///     bus.queue("orders").send(&1).await?;
///     Ok(())
/// }
///
/// fn main() -> std::process::ExitCode {
///     polymq::run(serve)
/// }
/// ```
pub fn run<F, Fut, E>(main: F) -> ExitCode
where
    F: FnOnce(Bus) -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: Into<Failure>,
{
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("the runtime cannot be started: {error}")),
    };
    let outcome = runtime.block_on(run_service(|bus| async { main(bus).await.map_err(Into::into) }));
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(&failure.to_string()),
    }
}

fn fail(sentence: &str) -> ExitCode {
    use std::io::Write;
    let line =
        sentence.split(['\n', '\r']).map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ");
    // Nobody can be told about a stderr that is closed.
    let _ = writeln!(std::io::stderr(), "error: {line}");
    ExitCode::FAILURE
}
