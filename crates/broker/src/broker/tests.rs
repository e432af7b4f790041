use super::*;

#[tokio::test]
async fn a_sync_that_fails_during_the_stop_is_told() {
    for fails in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let broker = Broker::builder().listen("127.0.0.1:0").data_dir(folder.path()).start().await.unwrap();
        broker.store.break_syncs(fails);
        let told = broker.stop().await.map(|cause| cause.to_string());
        assert_eq!(told.is_some(), fails, "{told:?}");
        assert!(told.is_none_or(|cause| cause.contains("cannot be synced")), "the cause");
    }
}
