#![doc = include_str!("../README.md")]

mod consumer;
mod main_function;
mod message;
mod options;

use proc_macro::TokenStream;

/// Registers an async function as the handler of a queue, or of a topic for a group.
///
/// The function stays as it is. Every argument is extracted from the message, and the result settles it.
///
/// ```
/// use polymq::prelude::*;
///
/// #[consumer("orders", concurrency = 8, timeout = "5s", attempts = 3)]
/// async fn bill(order: Json<u64>, context: Context) -> Result<()> {
///     println!("order {} of attempt {}", order.0, context.attempt());
///     Ok(())
/// }
/// ```
///
/// The first argument is the name of the channel. Options follow, each at most once:
///
/// | option | meaning | by hand |
/// |---|---|---|
/// | `group = "audit"` | a topic, as a member of this group | `Route::group` |
/// | `broadcast` | a topic, with a subscription of its own | `Route::broadcast` |
/// | `kind = "order.created"` | only messages of this kind | `Route::kind` |
/// | `version = 2` | only messages of this schema version | `Route::version` |
/// | `concurrency = 8` | the most handlers that run at a time | `Route::concurrency` |
/// | `batch = 128` | a function of `Batch<T>` that takes up to so many messages | `ConsumerFactory::route_batch` |
/// | `blocking` | an ordinary function that blocks its thread | `polymq::blocking` |
/// | `timeout = "5s"` | an attempt that takes longer is cancelled and has failed | `Route::timeout` |
/// | `prefetch = 50` | the most messages fetched and not settled | `Route::prefetch` |
/// | `ordered_by_key` | messages of one key one after the other | `Route::ordered_by_key` |
/// | `existing` | the channel is not created; a missing one is an error at start | `Route::existing` |
/// | `attempts = 3` | how often a message is tried in all | `FailurePolicy::max_attempts` |
/// | `retry = "in_place"` | where retries happen: `in_place` or `redeliver` | `FailurePolicy::mode` |
/// | `dead_letters = "orders.failed"` | the queue for dead letters | `FailurePolicy::dead_letters` |
/// | `policy = my_policy()` | a `FailurePolicy`, instead of the three above | `Route::policy` |
/// | `ack = "on_receipt"` | when it is acknowledged: `after_success`, `on_receipt` or `always` | `Route::ack_mode` |
/// | `with("qos", "2")` | a setting that only one backend knows; may be repeated | `Route::with` |
/// | `crate = mq` | the path of the crate `polymq`, where it has another name | |
///
/// A value may also be a constant or another expression: `#[consumer(QUEUE, concurrency = WORKERS)]`. An argument
/// that cannot be extracted does not compile, and the compiler points at its type:
///
/// ```compile_fail,E0277
/// struct NotDeserializable;
///
/// #[polymq::consumer("orders")]
/// async fn handle(order: NotDeserializable) {}
/// ```
#[proc_macro_attribute]
pub fn consumer(options: TokenStream, item: TokenStream) -> TokenStream {
    consumer::expand(options.into(), item.into()).into()
}

/// Makes `async fn main` the main function of a service: starts a multi-threaded tokio runtime, connects to what the
/// environment chooses, runs every `#[consumer]` function of the program beside `main` until SIGINT or SIGTERM, and
/// drains them.
///
/// The exit code is 0, or 1 after an error, which is printed to stderr as one line. Nothing else is set up: a
/// program that wants logs installs a `tracing` subscriber at the beginning of its `main`.
///
/// ```no_run
/// use polymq::prelude::*;
///
/// #[polymq::main]
/// async fn main(bus: Bus) -> Result<()> {
///     bus.queue("orders").send(&1).await?;
///     Ok(())
/// }
/// ```
///
/// `main` may leave the argument out, and may return a `Result` with any error. `crate = mq` names the crate
/// `polymq` where it has another name.
#[proc_macro_attribute]
pub fn main(options: TokenStream, item: TokenStream) -> TokenStream {
    main_function::expand(options.into(), item.into()).into()
}

/// Gives a type its name on the wire, so that messages of several types can share one queue.
///
/// ```
/// use polymq::prelude::*;
/// # use polymq::Kinds;
///
/// #[derive(Message)]
/// #[message(kind = "order.created", version = 2)]
/// struct Order { id: u64 }
///
/// #[derive(Message)] // the kind is "order.cancelled"
/// struct OrderCancelled { id: u64 }
///
/// let kinds = Kinds::linked()?;
/// assert_eq!(kinds.get(std::any::TypeId::of::<OrderCancelled>()).unwrap().to_string(), "order.cancelled");
/// # Ok::<(), polymq::Error>(())
/// ```
///
/// | attribute | meaning |
/// |---|---|
/// | `kind = "order.created"` | the kind; without it the type's name in lower case, its words separated by dots |
/// | `version = 2` | the schema version; without it messages carry none and any is taken |
/// | `queue = "orders"` or `topic = "orders"` | where its messages travel: `Topology::linked` makes these channels, `ConsumerFactory::route_declared` consumes them all |
/// | `crate = mq` | the path of the crate `polymq`, where it has another name |
///
/// Serialization stays serde's: derive `Serialize` and `Deserialize` beside it. A generic type has no kind of its
/// own; bind each concrete type with `Kinds::bind`.
#[proc_macro_derive(Message, attributes(message))]
pub fn derive_message(item: TokenStream) -> TokenStream {
    message::expand(item.into()).into()
}
