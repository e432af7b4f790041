//! One file for each command.

pub(crate) mod backends;
pub(crate) mod channels;
pub(crate) mod check;
pub(crate) mod consume;
pub(crate) mod dead_letters;
pub(crate) mod send;
pub(crate) mod topology;

use polymq::{Bus, BusBuilder};

use crate::{exit::Failed, output::Output};

/// Connects; says what a newcomer would wonder about.
pub(crate) async fn connect(builder: BusBuilder, output: &Output) -> Result<Bus, Failed> {
    let bus = builder.connect().await?;
    if bus.backend() == "memory" {
        output.note("the memory backend ends with this command; choose a broker with --url or POLYMQ_URL");
    }
    Ok(bus)
}

/// Resolves when the command is asked to end, from this call on.
pub(crate) fn interrupted() -> impl Future<Output = ()> {
    #[cfg(unix)]
    let signals = {
        use tokio::signal::unix::{SignalKind, signal};
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    };
    async move {
        #[cfg(unix)]
        if let (Ok(mut interrupt), Ok(mut terminate)) = signals {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    }
}
