//! What is particular to Kafka, against a real one. The contract itself is tested by the shared suite.
//!
//! The broker is started by `scripts/brokers`; without one, these tests fail.

#![allow(missing_docs, unreachable_pub)]

mod common;

#[path = "broker/closing.rs"]
mod closing;
#[cfg(feature = "tls")]
#[path = "broker/encryption.rs"]
mod encryption;
#[path = "broker/files.rs"]
mod files;
#[path = "broker/groups.rs"]
mod groups;
#[path = "broker/harness.rs"]
mod harness;
#[path = "broker/idle.rs"]
mod idle;
#[cfg(feature = "tls")]
#[path = "broker/logins.rs"]
mod logins;
#[path = "broker/opening.rs"]
mod opening;
#[path = "broker/positions.rs"]
mod positions;
#[path = "broker/records.rs"]
mod records;
#[path = "broker/topics.rs"]
mod topics;
#[path = "broker/transactions.rs"]
mod transactions;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn trial(name: &'static str, test: impl Future<Output = ()> + Send + 'static) -> Trial {
    Trial::test(name, move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(test);
        Ok(())
    })
}

macro_rules! trials {
    ($module:ident: $($name:ident),* $(,)?) => {
        vec![$(trial(stringify!($name), async { $module::$name().await })),*]
    };
}

fn main() -> ExitCode {
    // RUST_LOG=polymq_kafka=debug tells what happened.
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    transactions::run_if_child();
    idle::run_if_child();
    let mut arguments = Arguments::from_args();
    // Each test has two workers of its own already.
    arguments.test_threads.get_or_insert(4);
    let mut trials = trials!(groups:
        c18_the_committed_position_never_passes_an_unfinished_message,
        two_processes_share_by_partitions_and_nothing_is_handled_twice,
        o1_keys_keep_their_order_while_members_come_and_go,
        a_partition_that_goes_waits_for_its_handlers,
        what_is_out_when_a_partition_goes_is_stale,
        a_partition_that_went_away_while_it_was_paused_is_read_again,
        a_consumer_that_is_given_up_while_it_is_made_is_in_nobodys_way,
        a_retry_in_one_group_is_no_message_to_another,
        a_queue_that_is_named_like_a_group_has_nothing_to_do_with_it,
        a_group_begins_where_it_is_told_to,
        a_declared_group_misses_nothing,
        the_prefetch_is_bounded_in_bytes,
        the_prefetch_is_bounded_in_bytes_of_headers,
    );
    trials.extend(trials!(closing:
        nothing_is_acknowledged_after_a_close,
        a_close_that_was_dropped_is_waited_for,
        nobody_begins_to_consume_while_the_connection_closes,
        a_closed_consumer_has_committed,
        a_body_that_is_kept_outlives_its_consumer,
        a_message_is_retried_or_acknowledged,
    ));
    trials.extend(trials!(topics:
        h7_topics_are_made_as_they_are_wanted,
        h7_more_copies_than_brokers_are_an_error,
        looking_makes_no_topic,
        a_topic_made_by_another_tool_is_taken_as_it_is,
        a_delay_topic_that_is_made_later_is_read,
        requests_are_answered_where_topics_are_only_checked,
        partitions_that_are_added_are_read_without_a_group,
        partitions_that_are_added_are_read_by_a_group_that_was_away,
        a_deleted_topic_ends_its_consumers,
    ));
    trials.extend(trials!(positions:
        a_position_in_the_delay_topic_is_committed_with_each_assignment,
        declaring_does_not_move_a_group_that_exists,
        a_commit_that_is_refused_is_repeated,
    ));
    trials.extend(trials!(opening:
        a_position_is_for_the_first_opening,
        whoever_joins_a_group_that_cannot_begin_hears_so,
        a_consumer_whose_place_is_taken_is_nothing_to_senders,
    ));
    trials.extend(trials!(files: a_file_that_is_missing_for_a_moment_ends_nothing));
    trials.extend(trials!(records:
        keys_choose_the_partition_as_other_clients_do,
        b15_closing_flushes_what_was_not_awaited,
        what_is_withdrawn_in_an_outage_is_gone,
        a_foreign_record_may_hold_anything,
        what_is_no_text_stops_nobody,
        delayed_messages_are_in_the_delay_topic_until_they_are_due,
        clients_of_your_own_have_the_same_login,
    ));
    trials.extend(trials!(transactions:
        what_is_sent_and_the_position_are_one,
        what_is_given_up_leaves_nothing,
        what_fails_sends_nothing_and_is_tried_again,
        transactional_consumers_are_not_mixed_with_others,
        what_ends_a_transaction_is_not_held_against_its_message,
        a_kill_leaves_all_or_nothing,
    ));
    trials.extend(trials!(idle: j11_an_idle_consumer_costs_less_than_a_hundredth_of_a_core));
    #[cfg(feature = "tls")]
    trials.extend(trials!(logins:
        j5_logins_are_checked_by_each_mechanism,
        j5_a_rotated_password_reaches_every_connection,
    ));
    #[cfg(feature = "tls")]
    trials.extend(trials!(encryption: j4_certificates_are_checked));
    if !arguments.list {
        harness::start();
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    // A static is never dropped, and a broker must not outlive its tests.
    harness::stop();
    if conclusion.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
