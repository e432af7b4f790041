#![doc = include_str!("../README.md")]

mod known;
mod run;

/// Crates whose linking makes their backend known.
mod backends {
    #[cfg(feature = "amqp")]
    use polymq_amqp as _;
    #[cfg(feature = "embedded")]
    use polymq_embedded as _;
    #[cfg(feature = "http")]
    use polymq_http as _;
    #[cfg(feature = "kafka")]
    use polymq_kafka as _;
    #[cfg(feature = "kubemq")]
    use polymq_kubemq as _;
    #[cfg(feature = "mqtt")]
    use polymq_mqtt as _;
    #[cfg(feature = "sqs")]
    use polymq_sqs as _;
}

pub use polymq_core::*;
#[cfg(feature = "macros")]
pub use polymq_macros::{Message, consumer, main};
pub use serde;

pub use crate::run::run;

/// What most programs use, for one glob import.
///
/// `Result` has defaults here: `Result<()>` or `Result` alone is what handlers and `main` return. `Serialize` and
/// `Deserialize` are serde's, traits and derives; the derives need the crate `serde` in the program's `Cargo.toml`,
/// or `#[serde(crate = "polymq::serde")]` on the type.
pub mod prelude {
    pub use polymq_core::{
        Batch, Body, Bus, ConsumerFactory, ConsumerRunner, Context, Failure, FailurePolicy, HandlerFactory, Json,
        Message, Outcome, Registry, Settings, State,
    };
    #[cfg(feature = "macros")]
    pub use polymq_macros::{Message, consumer};
    pub use serde::{Deserialize, Serialize};

    /// What handlers and `main` return: any error becomes a [`Failure`] with `?`.
    pub type Result<T = (), E = Failure> = std::result::Result<T, E>;
}

/// For the macros of this project only.
#[doc(hidden)]
pub mod __private {
    pub use polymq_core::__private::inventory;
}

/// The snippets of the repository's first page and guide are compiled with the doc tests.
#[cfg(all(doctest, feature = "macros"))]
mod pages {
    #[doc = include_str!("../../../README.md")]
    struct Readme;
    #[doc = include_str!("../../../docs/getting-started.md")]
    struct GettingStarted;
    #[doc = include_str!("../../../docs/concepts.md")]
    struct Concepts;
}
