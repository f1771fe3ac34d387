//! The enforcer against the kernel, in a scratch network namespace. The tests need root and the
//! program `nft`; they fail without.

use std::time::{Duration, Instant};

use proptest::collection::vec;
use skein_netlink::nftables::Monitor;

use super::generate::{CROWDED, Cluster, SMALL, cluster};
use super::incremental::{Step, step, take};
use super::kernel::{in_namespace, listed, nft, samples, table};
use crate::compile::{Families, compile};
use crate::enforce::{EnforceError, Enforcer, Event, Installed};
use crate::engine::Engine;
use crate::program::Program;
use crate::render::{Mode, install};

/// Bound of waits for an event, far above the time that the event needs.
const EVENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs a future in a scratch network namespace.
pub(super) fn run<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    in_namespace(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
}

/// Returns an enforcer with a monitor of its own.
pub(super) fn open() -> Enforcer {
    Enforcer::open(table(), &Monitor::start().unwrap()).unwrap()
}

/// Waits until the enforcer reports that the table can differ.
async fn changed(enforcer: &mut Enforcer) {
    let wait = async { while enforcer.next_event().await != Event::Changed {} };
    tokio::time::timeout(EVENT_TIMEOUT, wait).await.expect("the change is not reported");
}

fn delete_table() {
    nft(&["delete", "table", "inet", "skein-policy"], "");
}

/// Returns the objects of a table that the text of the program creates.
fn expected(program: &Program) -> Vec<String> {
    nft(&["-f", "-"], &install(&table(), program));
    let objects = listed();
    delete_table();
    objects
}

/// Returns an installed program with port maps, ranges and named ports.
fn crowded() -> Program {
    let clusters: Vec<Cluster> = samples(&cluster(CROWDED), 8);
    let programs = clusters.iter().map(|one| compile(&one.inventory(), Families::BOTH));
    programs.max_by_key(|program| program.port_maps.len() * 100 + program.sets.len()).unwrap()
}

#[test]
fn installed_program_equals_its_text() {
    run(|| async {
        let mut clusters: Vec<Cluster> = samples(&cluster(SMALL), 12);
        clusters.extend(samples(&cluster(CROWDED), 12));
        let mut enforcer = open();
        for cluster in clusters {
            let program = compile(&cluster.inventory(), Families::BOTH);
            let expected = expected(&program);
            assert_eq!(enforcer.install(&program).await.unwrap(), Installed::Created);
            assert_eq!(listed(), expected, "the installed table differs from the text");
            assert!(enforcer.verify(&program).await.unwrap(), "the table is as installed");
            assert_eq!(enforcer.install(&program).await.unwrap(), Installed::Unchanged);
            delete_table();
        }
    });
}

#[test]
fn programs_replace_each_other_without_new_base_chains() {
    run(|| async {
        let mut enforcer = open();
        enforcer.install(&Program::default()).await.unwrap();
        let base = base_chains();
        for cluster in samples(&cluster(SMALL), 12) {
            let program = compile(&cluster.inventory(), Families::BOTH);
            enforcer.install(&program).await.unwrap();
            assert!(enforcer.verify(&program).await.unwrap(), "the table is not as installed");
            assert_eq!(base_chains(), base, "base chains were created again");
        }
    });
}

/// Returns the declarations of the base chains with their handles.
fn base_chains() -> Vec<String> {
    let text = nft(&["-a", "list", "table", "inet", "skein-policy"], "");
    let chains = text.lines().filter(|line| line.contains("chain") && line.contains("# handle"));
    let base = chains.filter(|line| ["egress", "ingress", "node"].iter().any(|b| line.contains(b)));
    base.map(str::to_owned).collect()
}

#[test]
fn differences_lead_to_the_installed_program() {
    run(|| async {
        for steps in samples(&vec(step(), 25), 6) {
            let mut engine = Engine::new(Families::BOTH);
            let mut enforcer = open();
            enforcer.install(engine.program()).await.unwrap();
            for step in steps {
                let step: Step = step;
                take(&mut engine, step);
                enforcer.apply(&engine.take_difference()).await.unwrap();
                let equal = enforcer.verify(engine.program()).await.unwrap();
                assert!(equal, "the table is not as the program");
            }
            let changed = listed();
            delete_table();
            assert_eq!(changed, expected(engine.program()), "the table differs from the text");
        }
    });
}

#[test]
fn table_of_an_earlier_process_is_adopted() {
    run(|| async {
        let program = crowded();
        open().install(&program).await.unwrap();
        let (objects, base) = (listed(), base_chains());
        let mut enforcer = open();
        enforcer.install(&program).await.unwrap();
        assert_eq!(listed(), objects, "the adopted table has changed");
        assert_eq!(base_chains(), base, "base chains were created again");
        assert!(enforcer.verify(&program).await.unwrap(), "the adopted table is as wanted");
    });
}

#[test]
fn changes_of_other_programs_are_repaired() {
    run(|| async {
        let program = crowded();
        let mut enforcer = open();
        enforcer.install(&program).await.unwrap();
        let objects = listed();
        let interface = program.to.keys().next().unwrap();
        let (chain, _) = program.chains.first_key_value().unwrap();
        let (set, elements) = program.elements.first_key_value().unwrap();
        let element = elements.first().unwrap();
        let (map, _) = program.port_maps.first_key_value().unwrap();
        let inet = "inet skein-policy";
        for change in [
            "flush ruleset".to_owned(),
            format!("delete table {inet}"),
            format!("delete element {inet} to {{ {interface} }}"),
            format!("delete element {inet} {set} {{ {element} }}"),
            format!("flush chain {inet} {chain}"),
            format!("insert rule {inet} {chain} accept"),
            format!("flush map {inet} {map}"),
            format!("flush chain {inet} refuse"),
            format!("flush chain {inet} egress\ndelete chain {inet} egress"),
            format!("insert rule {inet} ingress accept"),
            format!("add table {inet} {{ flags dormant; }}"),
            format!("add set {inet} other {{ type mark; }}\nadd chain {inet} another"),
        ] {
            nft(&["-f", "-"], &change);
            let start = Instant::now();
            changed(&mut enforcer).await;
            let installed = enforcer.install(&program).await.unwrap();
            println!("repaired in {:?}: {change:?}", start.elapsed());
            assert_ne!(installed, Installed::Unchanged, "nothing was repaired after: {change}");
            assert_eq!(listed(), objects, "not repaired: {change}");
        }
    });
}

#[test]
fn own_changes_are_not_reported_as_foreign() {
    run(|| async {
        let program = crowded();
        let mut enforcer = open();
        enforcer.install(&Program::default()).await.unwrap();
        let there = crate::program::Difference::between(&Program::default(), &program);
        let back = crate::program::Difference::between(&program, &Program::default());
        for difference in [&there, &back, &there] {
            enforcer.apply(difference).await.unwrap();
        }
        nft(&["add", "table", "inet", "other"], "");
        let wait = tokio::time::timeout(Duration::from_millis(200), changed(&mut enforcer)).await;
        assert!(wait.is_err(), "own transactions and other tables are no foreign changes");
    });
}

#[test]
fn difference_for_other_content_is_refused_and_repaired() {
    run(|| async {
        let mut engine = Engine::new(Families::BOTH);
        let mut enforcer = open();
        enforcer.install(engine.program()).await.unwrap();
        let pod = crate::model::PodId { namespace: "x".to_owned(), name: "a".to_owned() };
        engine.attach("skp1", pod);
        enforcer.apply(&engine.take_difference()).await.unwrap();
        nft(&["flush", "map", "inet", "skein-policy", "from"], "");
        engine.detach("skp1");
        let error = enforcer.apply(&engine.take_difference()).await.unwrap_err();
        assert!(matches!(error, EnforceError::Netlink(_)), "{error}");
        changed(&mut enforcer).await;
        assert_eq!(enforcer.install(engine.program()).await.unwrap(), Installed::Repaired);
        assert!(enforcer.verify(engine.program()).await.unwrap(), "the table is repaired");
    });
}

#[test]
fn table_with_sets_of_other_types_is_replaced() {
    run(|| async {
        nft(
            &["-f", "-"],
            "add table inet skein-policy\nadd set inet skein-policy self { type mark; }",
        );
        let program = crowded();
        let mut enforcer = open();
        enforcer.install(&program).await.unwrap();
        assert!(enforcer.verify(&program).await.unwrap(), "the table is as wanted");
        let objects = listed();
        delete_table();
        assert_eq!(objects, expected(&program), "the table differs from the text");
    });
}

#[test]
fn mode_changes_the_verdict_of_refusals() {
    run(|| async {
        let program = crowded();
        let mut enforcer = open();
        enforcer.install(&program).await.unwrap();
        let verdict = || nft(&["list", "chain", "inet", "skein-policy", "refuse"], "");
        assert!(verdict().contains("drop") && !verdict().contains("accept"), "{}", verdict());
        enforcer.set_mode(Mode::Audit);
        assert_eq!(enforcer.install(&program).await.unwrap(), Installed::Repaired);
        assert!(verdict().contains("accept") && !verdict().contains("drop"), "{}", verdict());
    });
}
