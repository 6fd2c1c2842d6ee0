// Losses and gradient of all pairs and triplets from the squared distances of both sides.
//
// The formulas are those of chunked.py and strips.py. No cosine is written to memory: one pass over them adds up losses
// and gradient. native.py compiles this file and calls it. It needs no header of PyTorch, so that it compiles in a
// second.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

namespace {

// Of a tile of pairs (b, c). Its parts of three matrices stay in the second-level cache while all vertices visit it.
constexpr int64_t HEIGHT = 32, WIDTH = 512;

struct Batch {
    int64_t rows, vertices, threads;
    double delta, equal;
    const double* squares[2];         // (N, N) of student and teacher
    const double *distance, *angle;   // weights (N,) and (V,), or null
    double *distance_sums, *angle_sums;  // weighted losses, (N,) and (V,)
    double* gradient;                 // (N, N) by the student's squares, or null
};

// Calls work(part, first, last) for equal parts of the range, each on a thread that ends with it.
template <typename Work>
void in_parts(int64_t parts, int64_t count, Work work) {
    std::vector<std::thread> others;
    for (int64_t part = 1; part < parts; part++)
        others.emplace_back(work, part, part * count / parts, (part + 1) * count / parts);
    work(0, 0, count / parts);
    for (auto& other : others) other.join();
}

struct Lengths {
    double shortest = std::numeric_limits<double>::infinity(), longest = 0, mean = 0;
};

// The shortest squared distance of rows that are not equal, the longest, and the mean distance; 1 if all are equal.
Lengths lengths_of(const Batch& batch, const double* squares) {
    std::vector<Lengths> found(batch.threads);
    in_parts(batch.threads, batch.rows, [&, squares](int64_t part, int64_t first, int64_t last) {
        double shortest = found[part].shortest, longest = 0, sum = 0;
#pragma omp simd reduction(min : shortest) reduction(max : longest) reduction(+ : sum)
        for (int64_t i = first * batch.rows; i < last * batch.rows; i++) {
            const bool equal = squares[i] < batch.equal;
            const double square = equal ? 0 : squares[i];
            shortest = std::min(shortest, equal ? std::numeric_limits<double>::infinity() : square);
            longest = std::max(longest, square);
            sum += std::sqrt(square);
        }
        found[part].shortest = shortest, found[part].longest = longest, found[part].mean = sum;
    });
    Lengths all;
    for (const Lengths& part : found) {
        all.shortest = std::min(all.shortest, part.shortest);
        all.longest = std::max(all.longest, part.longest);
        all.mean += part.mean;
    }
    all.mean /= double(std::max<int64_t>(batch.rows * (batch.rows - 1), 1));
    if (all.mean == 0) all.mean = 1;
    return all;
}

template <typename Half, typename Cosine>
struct Side {
    std::vector<Half> halves;      // (N, N), half of the squared distances
    std::vector<Cosine> inverses;  // (N, N), of the lengths; 0 between equal rows

    Side(const Batch& batch, const double* squares) : halves(batch.rows * batch.rows), inverses(halves.size()) {
        in_parts(batch.threads, batch.rows, [&, squares](int64_t, int64_t first, int64_t last) {
            for (int64_t i = first * batch.rows; i < last * batch.rows; i++) {
                halves[i] = Half(squares[i] / 2);
                inverses[i] = squares[i] < batch.equal ? Cosine(0) : Cosine(1 / std::sqrt(squares[i]));
            }
        });
    }
};

template <typename Cosine>
struct Sums {
    double* losses;   // (V,)
    Cosine* arms;     // (V, N), sum_c P - r_ab^2 * sum_c W * cos
    Cosine* opposite;  // (N, N), sum_a weights_a * P, above the diagonal
};

// All pairs of arms b < c at the vertices from first to last.
template <typename Half, typename Cosine>
void sweep(const Batch& batch, int64_t first, int64_t last, const Side<Half, Cosine>& student,
           const Side<Half, Cosine>& teacher, Sums<Cosine> sums) {
    const int64_t rows = batch.rows;
    const Cosine delta = Cosine(batch.delta);
    for (int64_t top = 0; top < rows; top += HEIGHT)
        for (int64_t left = top; left < rows; left += WIDTH)
            for (int64_t a = first; a < last; a++) {
                const Half *h = &student.halves[a * rows], *teacher_h = &teacher.halves[a * rows];
                const Cosine *r = &student.inverses[a * rows], *teacher_r = &teacher.inverses[a * rows];
                Cosine* arms = sums.arms + a * rows;
                const Cosine weight = Cosine(batch.angle[a]);
                double total = 0;
                for (int64_t b = top; b < std::min(top + HEIGHT, rows); b++) {
                    const Half *h_b = &student.halves[b * rows], *teacher_h_b = &teacher.halves[b * rows];
                    const Half h_ab = h[b], teacher_h_ab = teacher_h[b];
                    const Cosine r_ab = r[b], teacher_r_ab = teacher_r[b];
                    Cosine* opposite = sums.opposite + b * rows;
                    Cosine loss = 0, arm = 0, turn = 0;
#pragma omp simd reduction(+ : loss, arm, turn)
                    for (int64_t c = std::max(left, b + 1); c < std::min(left + WIDTH, rows); c++) {
                        const Cosine scale = r_ab * r[c];
                        // Both cosines are rounded before they are compared: equal relations differ by exactly 0.
                        const Cosine cosine = Cosine(h[c] - h_b[c] + h_ab) * scale;
                        const Cosine expected =
                            Cosine(teacher_h[c] - teacher_h_b[c] + teacher_h_ab) * (teacher_r_ab * teacher_r[c]);
                        const Cosine difference = cosine - expected;
                        Cosine slope = difference > delta ? delta : difference;
                        slope = slope < -delta ? -delta : slope;  // NaN stays NaN
                        loss += (difference - Cosine(0.5) * slope) * slope;
                        const Cosine product = slope * scale, turned = slope * cosine;
                        arm += product;
                        turn += turned;
                        arms[c] += product - turned * (r[c] * r[c]);
                        opposite[c] += weight * product;
                    }
                    total += loss;
                    arms[b] += arm - turn * (r_ab * r_ab);
                }
                sums.losses[a] += total;
            }
}

// Each thread has its own vertices and its own `opposite`, so that the result depends on their number alone.
template <typename Half, typename Cosine>
void angles(const Batch& batch) {
    const int64_t rows = batch.rows, vertices = batch.vertices, size = rows * rows;
    const Side<Half, Cosine> student(batch, batch.squares[0]), teacher(batch, batch.squares[1]);
    std::vector<Cosine> arms(vertices * rows), opposite(batch.threads * size);
    in_parts(batch.threads, vertices, [&](int64_t part, int64_t first, int64_t last) {
        sweep(batch, first, last, student, teacher,
              {batch.angle_sums, arms.data(), opposite.data() + part * size});
    });
    for (int64_t a = 0; a < vertices; a++) batch.angle_sums[a] *= 2 * batch.angle[a];
    if (batch.gradient == nullptr) return;
    in_parts(batch.threads, rows, [&](int64_t, int64_t first, int64_t last) {
        for (int64_t i = first * rows; i < last * rows; i++) {
            double gradient = 0;
            for (int64_t part = 0; part < batch.threads; part++) gradient -= opposite[part * size + i];
            if (i < vertices * rows) gradient += batch.angle[i / rows] * arms[i];
            batch.gradient[i] += gradient;
        }
    });
}

void distances(const Batch& batch, double mean, double teacher_mean) {
    const int64_t rows = batch.rows;
    std::vector<double> through(batch.threads);
    auto slope_at = [&](int64_t i, double& length, double& difference) {
        const double *squares = batch.squares[0], *teacher = batch.squares[1];
        length = squares[i] < batch.equal ? 0 : std::sqrt(squares[i]);
        difference = length / mean - (teacher[i] < batch.equal ? 0 : std::sqrt(teacher[i])) / teacher_mean;
        const double slope = difference > batch.delta ? batch.delta : difference;
        return slope < -batch.delta ? -batch.delta : slope;
    };
    in_parts(batch.threads, rows, [&](int64_t part, int64_t first, int64_t last) {
        for (int64_t a = first; a < last; a++) {
            double loss = 0, sum = 0, length, difference;
            for (int64_t i = a * rows; i < (a + 1) * rows; i++) {
                const double slope = slope_at(i, length, difference);
                loss += (difference - slope / 2) * slope;
                sum += slope * length;
            }
            batch.distance_sums[a] = loss * batch.distance[a];
            through[part] += sum * batch.distance[a];
        }
    });
    if (batch.gradient == nullptr) return;
    double through_mean = 0;  // the gradient through the mean distance
    for (double part : through) through_mean += part;
    through_mean /= mean * mean * double(std::max<int64_t>(rows * (rows - 1), 1));
    in_parts(batch.threads, rows, [&](int64_t, int64_t first, int64_t last) {
        double length, difference;
        for (int64_t i = first * rows; i < last * rows; i++) {
            const double slope = slope_at(i, length, difference) * batch.distance[i / rows];
            if (length != 0) batch.gradient[i] += (slope / mean - through_mean) / (2 * length);
        }
    });
}

}  // namespace

// Adds to angle_sums and gradient, which the caller sets to 0. Returns 1, and does nothing, if the law of cosines loses
// digits: a ratio of squared distances is larger than `apart`. Up to a ratio of `even`, float32 holds the squares.
extern "C" int relations(int64_t rows, int64_t vertices, int64_t threads, int narrow, double delta, double equal,
                         double apart, double even, const double* student, const double* teacher,
                         const double* distance, const double* angle, double* distance_sums, double* angle_sums,
                         double* gradient) {
    const Batch batch{rows,     vertices, threads,       delta,      equal,   {student, teacher},
                      distance, angle,    distance_sums, angle_sums, gradient};
    const Lengths sides[2] = {lengths_of(batch, student), lengths_of(batch, teacher)};
    bool is_even = true;
    for (const Lengths& side : sides) {
        if (angle != nullptr && side.longest > apart * side.shortest) return 1;
        is_even = is_even && side.longest < even * side.shortest;
    }
    if (angle != nullptr) {
        if (!narrow)
            angles<double, double>(batch);
        else if (is_even)
            angles<float, float>(batch);
        else
            angles<double, float>(batch);
    }
    if (distance != nullptr) distances(batch, sides[0].mean, sides[1].mean);
    return 0;
}
