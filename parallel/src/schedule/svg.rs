//! Draws a checked schedule as a timeline: one row a rank, time to the right, gaps are the bubble.

use super::{Action, Report, Schedule, Times};
use std::fmt::Write;

const ROW: f64 = 22.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 46.0;
const WIDTH: f64 = 1800.0;
/// Forward, whole backward, input gradient, weights; one shade a direction.
const COLOURS: [[&str; 2]; 4] = [["#f6c667", "#e0913a"], ["#7fb3d9", "#3f7fb5"], ["#8fd0c8", "#4aa89c"], ["#b6cf8e", "#85a957"]];
const GAP: &str = "#eeeeee";

/// An SVG document. `times` are those that the report was made with.
pub fn timeline(schedule: Schedule, report: &Report, times: &Times) -> String {
    let num_ranks = report.spans.len();
    let scale = WIDTH / report.makespan;
    let (width, height) = (LEFT + WIDTH + 10.0, TOP + ROW * num_ranks as f64 + 34.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let num_micro_batches = report.spans[0].iter().map(|s| if matches!(s.action, Action::Forward(_) | Action::Pair { .. }) { 1 } else { 0 }).sum::<usize>();
    line(&mut svg, LEFT, 18.0, 14, &format!("{schedule}, {num_ranks} ranks, {num_micro_batches} micro-batches"));
    let facts = format!(
        "bubble {:.1} to {:.1} of {:.1} (formula {:.1}); in flight at most {}; forward {}, backward {}, weights {}, pair {}",
        report.bubble.iter().copied().fold(f64::MAX, f64::min),
        report.worst_bubble(),
        report.makespan,
        schedule.bubble(num_ranks, times),
        report.in_flight.iter().max().expect("at least one rank"),
        times.forward,
        times.backward,
        times.weight,
        times.pair
    );
    line(&mut svg, LEFT, 36.0, 11, &facts);
    for (rank, spans) in report.spans.iter().enumerate() {
        let y = TOP + ROW * rank as f64;
        line(&mut svg, 6.0, y + 15.0, 11, &format!("rank {rank}"));
        block(&mut svg, (LEFT, y, WIDTH, ROW - 3.0), GAP, "");
        for span in spans {
            let (x, w) = (LEFT + span.start * scale, (span.end - span.start) * scale);
            draw(&mut svg, &span.action, (x, y, w), times);
        }
    }
    let legend = ["forward", "backward", "input gradient", "weight gradient"];
    for (i, (name, colours)) in legend.iter().zip(COLOURS).enumerate() {
        let (x, y) = (LEFT + 200.0 * i as f64, height - 22.0);
        block(&mut svg, (x, y, 14.0, 12.0), colours[0], "");
        block(&mut svg, (x + 15.0, y, 14.0, 12.0), colours[1], "");
        line(&mut svg, x + 34.0, y + 10.0, 11, &format!("{name} (up, down)"));
    }
    svg.push_str("</svg>\n");
    svg
}

/// A pair is drawn as its forward above its backward.
fn draw(svg: &mut String, action: &Action, (x, y, w): (f64, f64, f64), times: &Times) {
    let (kind, chunk) = match *action {
        Action::Forward(c) => (0, c),
        Action::Backward(c) => (1, c),
        Action::BackwardInput(c) => (2, c),
        Action::BackwardWeight(c) => (3, c),
        Action::Pair { forward, backward } => {
            let full = ROW - 3.0;
            let upper = full * times.forward / (times.forward + times.backward);
            block(svg, (x, y, w, upper), COLOURS[0][forward.direction], "");
            return block(svg, (x, y + upper, w, full - upper), COLOURS[1][backward.direction], &backward.micro_batch.to_string());
        }
        Action::Exchange(_) => return,
    };
    block(svg, (x, y, w, ROW - 3.0), COLOURS[kind][chunk.direction], &chunk.micro_batch.to_string());
}

fn block(svg: &mut String, (x, y, w, h): (f64, f64, f64, f64), colour: &str, label: &str) {
    let edge = if label.is_empty() { "" } else { " stroke=\"white\" stroke-width=\"0.5\"" };
    let _ = writeln!(svg, "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{w:.2}\" height=\"{h:.2}\" fill=\"{colour}\"{edge}/>");
    // A label that does not fit is noise.
    if !label.is_empty() && w > 6.5 * label.len() as f64 + 2.0 {
        let _ = writeln!(svg, "<text x=\"{:.2}\" y=\"{:.2}\" font-size=\"9\" text-anchor=\"middle\">{label}</text>", x + w / 2.0, y + h / 2.0 + 3.0);
    }
}

fn line(svg: &mut String, x: f64, y: f64, size: u32, text: &str) {
    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" font-size=\"{size}\">{text}</text>");
}
