// A client in Go: go run . ADDRESS USER_ID
//
// Creates a segment, rolls it out, reads a user, deletes it, and shows an error's reason. docs/clients.md says how the
// package segmentationv1 is generated.
package main

import (
	"context"
	_ "embed"
	"fmt"
	"log"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	segmentationv1 "example.com/client/segmentation/v1"
)

//go:embed service_config.json
var serviceConfig string

const (
	readDeadline   = 500 * time.Millisecond // what a login may wait
	changeDeadline = 60 * time.Second
)

// reasonOf returns the service's stable reason, or "" if the error does not come from the service.
func reasonOf(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.Domain == "segsvc" {
			return info.Reason
		}
	}
	return ""
}

// isMember says whether the user is in the segment; nobody is whom the service does not know (yet).
func isMember(memberships segmentationv1.MembershipServiceClient, userID int64, slug string) (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), readDeadline)
	defer cancel()
	answer, err := memberships.GetUserSegments(ctx, &segmentationv1.GetUserSegmentsRequest{UserId: userID})
	if reasonOf(err) == "USER_NOT_FOUND" {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return slices.Contains(answer.Slugs, slug), nil
}

// token is sent with each call. With TLS, RequireTransportSecurity should be true.
type token string

func (t token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	if t == "" {
		return nil, nil
	}
	return map[string]string{"authorization": "Bearer " + string(t)}, nil
}

func (token) RequireTransportSecurity() bool { return false }

func run(address string, userID int64) error {
	conn, err := grpc.NewClient(
		address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithPerRPCCredentials(token(os.Getenv("SEGSVC_TOKEN"))),
		grpc.WithDefaultServiceConfig(serviceConfig),
	)
	if err != nil {
		return err
	}
	defer conn.Close()
	memberships := segmentationv1.NewMembershipServiceClient(conn)
	segments := segmentationv1.NewSegmentServiceClient(conn)
	ctx, cancel := context.WithTimeout(context.Background(), changeDeadline)
	defer cancel()

	// One request_id for one change: repeated with it, a call changes nothing twice.
	slug := "go-client-" + uuid.NewString()[:8]
	_, err = segments.CreateSegment(ctx, &segmentationv1.CreateSegmentRequest{
		Segment:   &segmentationv1.Segment{Slug: slug, DisplayName: "Made by a client"},
		RequestId: uuid.NewString(),
	})
	if err != nil {
		return err
	}

	// The call waits for the end. An operation that failed is an answer with an error, not an RPC error.
	percent := 100.0
	operation, err := segments.RollOutSegment(ctx, &segmentationv1.RollOutSegmentRequest{
		Slug:      slug,
		Rule:      &segmentationv1.RollOutRule{Percent: &percent},
		RequestId: uuid.NewString(),
	})
	if err != nil {
		return err
	}
	fmt.Printf("%s: done=%t error='%s'\n", operation.Name, operation.Done, operation.GetError().GetMessage())

	member, err := isMember(memberships, userID, slug)
	if err != nil {
		return err
	}
	fmt.Printf("user %d is in %s: %t\n", userID, slug, member)
	_, err = segments.DeleteSegment(ctx, &segmentationv1.DeleteSegmentRequest{Slug: slug, RequestId: uuid.NewString()})
	if err != nil {
		return err
	}
	member, err = isMember(memberships, userID, slug)
	if err != nil {
		return err
	}
	fmt.Printf("user %d is in %s: %t\n", userID, slug, member)

	_, err = segments.GetSegment(ctx, &segmentationv1.GetSegmentRequest{Slug: slug})
	fmt.Println(status.Code(err), reasonOf(err))
	return nil
}

func main() {
	userID, err := strconv.ParseInt(os.Args[2], 10, 64)
	if err != nil {
		log.Fatal(err)
	}
	if err := run(os.Args[1], userID); err != nil {
		log.Fatal(err)
	}
}
